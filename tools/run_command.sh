# The common part of inference.sh and finetune_*.sh, which source it in the repository root. `run COMMAND ARGUMENTS`
# runs COMMAND with the ARGUMENTS, or without arguments the script's `run_cmd`. Before that the environment is set up,
# and the clips for configs/tiny/sft.yaml are drawn and encoded.

# `python` and `torchrun` in a command are those of the environment. They replace the script's process, so that signals
# reach them.
python() {
    if ((${NPROC:-1} > 1)); then
        torchrun --standalone --nproc_per_node="$NPROC" "$@"
    fi
    exec "$environment_python" "$@"
}

torchrun() {
    exec "$environment_python" tools/torchrun.py "$@"
}

# Draws clips in FOLDER, and encodes them in FOLDER_latents, unless that exists and is newer than the VAE. The other
# arguments select the content of the clips.
prepare_clips() {
    local folder=$1 latents=$1_latents unfinished=$1_latents.unfinished vae=assets/tiny/vae.safetensors
    shift
    if [[ ! -e $latents || $vae -nt $latents ]]; then
        rm -rf "$latents"
        if [[ $vae -nt $unfinished ]]; then
            rm -rf "$unfinished"
        fi
        "$environment_python" tools/make_shapes_dataset.py --output "$folder" --frames 9 --size 64 64 --fps 8 "$@"
        # With the first frames, which text-to-video ignores.
        "$environment_python" tools/precompute_latents.py --output "$unfinished" \
            --base configs/tiny/cogvideox_tiny_i2v.yaml configs/tiny/sft.yaml --train_data "$folder"
        mv "$unfinished" "$latents"
    fi
}

run() {
    local command=$1 script word words=() program= help= spirals=
    shift
    if (($#)); then
        run_cmd="$command $(printf '%q ' "$@")"
    fi
    eval "words=($run_cmd)"
    for word in "${words[@]}"; do
        # A script's name without a folder, as in the original, is a script in sat/.
        if [[ $word == *.py && $word != */* && ! -e $word && -e sat/$word ]]; then
            run_cmd=" $run_cmd "
            run_cmd=${run_cmd/" $word "/" sat/$word "}
            break
        fi
    done
    eval "words=($run_cmd)"
    for word in "${words[@]}"; do
        case "$word" in
            -h | --help) help=yes ;;
            *.py) program=${program:-$word} ;;
            *configs/tiny/sft.yaml) spirals=yes ;;
        esac
    done

    if [[ $help ]]; then
        script=$(basename "${BASH_SOURCE[-1]}")
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$script"
        # The options need the packages, which --help must not install.
        environment_python=$(bash tools/setup_environment.sh --check requirements.txt 2>/dev/null) || exit 0
        echo
        exec "$environment_python" "$program" --help
    fi

    environment_python=$(bash tools/setup_environment.sh requirements.txt)
    export PATH="$(dirname "$environment_python"):$PATH" TOKENIZERS_PARALLELISM=false
    if [[ $spirals ]]; then
        prepare_clips data/spirals --concept spiral --clips 30 --seed 0
        prepare_clips data/known_shapes --clips 240 --seed 1 --motions \
            "moving left" "moving right" "moving up" "moving down" growing shrinking bouncing "standing still" \
            "moving in a circle" "moving in a circle" "moving in a circle" "moving in a circle"
    fi
    eval "$run_cmd"
}
