#!/usr/bin/env bash
# Samples videos: with the command below, or with the arguments given here.
# Sets up the environment where needed, and builds the tiny model when its configuration (configs/tiny) is used.
# Paths are relative to the repository root.
#
#   bash inference.sh                                                            the tiny model, on any machine
#   bash inference.sh --base configs/cogvideox_5b.yaml configs/inference.yaml --seed 42
#   NPROC=4 bash inference.sh --base ...                                         on four GPUs, the prompts shared out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

run_cmd="python sat/sample_video.py --base configs/tiny/cogvideox_tiny.yaml configs/tiny/inference.yaml --seed 42"

if (($#)); then
    run_cmd=$(printf '%q ' python sat/sample_video.py "$@")
fi
eval "words=($run_cmd)"

tiny_configs=() help=
for word in "${words[@]}"; do
    case "$word" in
        -h | --help) help=yes ;;
        *configs/tiny/*.yaml) tiny_configs+=("$word") ;;
    esac
done

if [[ $help ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' inference.sh
    # The options themselves need the packages, which asking for help must not install.
    python=$(bash tools/setup_environment.sh --check requirements.txt 2>/dev/null) || exit 0
    echo
    exec "$python" sat/sample_video.py --help
fi

environment_python=$(bash tools/setup_environment.sh requirements.txt)
export PATH="$(dirname "$environment_python"):$PATH" TOKENIZERS_PARALLELISM=false

# What `python` means in the command: that of the environment, under torchrun for several processes. It takes the place
# of this script, so that signals reach it.
python() {
    if ((${NPROC:-1} > 1)); then
        exec "$environment_python" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" "$@"
    fi
    exec "$environment_python" "$@"
}

if ((${#tiny_configs[@]})); then
    "$environment_python" tools/build_tiny_model.py --config "${tiny_configs[@]}"
fi
eval "$run_cmd"
