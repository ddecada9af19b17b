#!/usr/bin/env bash
# Trains the tiny model of assets/tiny from scratch, on generated clips: all parts, or the given ones.
# Finished parts are kept, and an interrupted training resumes: runs are in ckpts/tiny, clips and latents in data/tiny.
# To start again, move these folders and checkpoints/tiny away.
# Sets up the environment if needed.
#
#   bash tools/train_tiny.sh
#   bash tools/train_tiny.sh text vae                  the text encoder and the VAE
#   bash tools/train_tiny.sh text_to_video image_to_video
#   bash tools/train_tiny.sh continue                  from text_to_video: a network that continues a clip
#
# Takes ten hours on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' tools/train_tiny.sh
    exit
fi

train_text() {
    if [[ ! -e checkpoints/tiny/t5/spiece.model ]]; then
        "$python" tools/train_text_encoder.py --output checkpoints/tiny/t5
    fi
    mkdir -p assets/tiny/t5
    cp checkpoints/tiny/t5/* assets/tiny/t5
}

train_vae() {
    # Images first: their steps take a fraction of the time, and teach everything except motion.
    dataset vae_images --images 6000 --clips 8
    dataset vae_clips --clips 3000 --seed 1
    clips_more
    dataset vae_hard --clips 5000 --seed 11 --sizes small small medium large \
        --shapes circle triangle square ring ring cross cross \
        --motions "${hard_motions[@]}" "moving in a circle" bouncing
    dataset vae_valid --clips 32 --seed 2 --split held_out
    train_vae_part vae_images vae_tiny_images
    train_vae_part vae vae_tiny
    train_vae_part vae_again vae_tiny_again
    train_vae_part vae_more vae_tiny_more
    train_vae_part vae_final vae_tiny_final
    "$python" tools/whiten_latents.py --base configs/tiny/vae.yaml --data data/tiny/vae_clips \
        --ckpt checkpoints/tiny/vae_final/3d-vae.pt --output checkpoints/tiny/vae_white.safetensors --overwrite
    export_weights checkpoints/tiny/vae_white.safetensors vae
}

# Arguments: a configuration, and the name of its run, whose weights go to checkpoints/tiny.
train_vae_part() {
    "$python" sat/train_vae.py --base "configs/tiny/$1.yaml" --resume latest
    mkdir -p "checkpoints/tiny/$1"
    cp "$(latest_run "$2")/3d-vae.pt" "checkpoints/tiny/$1/3d-vae.pt"
}

train_text_to_video() {
    local base=(configs/tiny/cogvideox_tiny.yaml configs/tiny/train.yaml)
    dataset clips --clips 8000 --seed 3
    # More of the shapes that take longest to learn.
    dataset clips_hard --clips 7000 --seed 5 --shapes square ring cross cross cross
    encode clips latents_text_to_video "${base[@]}"
    encode clips_hard latents_hard "${base[@]}"
    train_network text_to_video text_to_video "${base[@]}"
    # Then more of the content that is still wrong, from the weights just exported.
    base=(configs/tiny/cogvideox_tiny.yaml configs/tiny/train_more.yaml)
    clips_more
    encode clips_more latents_more "${base[@]}"
    train_network text_to_video_more text_to_video "${base[@]}"
    # Then the same for sharper edges, and finally for all content.
    base=(configs/tiny/cogvideox_tiny.yaml configs/tiny/train_last.yaml)
    train_network text_to_video_last text_to_video "${base[@]}"
    base=(configs/tiny/cogvideox_tiny.yaml configs/tiny/train_final.yaml)
    train_network text_to_video_final text_to_video "${base[@]}"
}

train_image_to_video() {
    local base=(configs/tiny/cogvideox_tiny_i2v.yaml configs/tiny/train_i2v.yaml)
    dataset clips_i2v --clips 3000 --seed 4
    encode clips_i2v latents_image_to_video "${base[@]}"
    train_network image_to_video image_to_video "${base[@]}"
    # Then mostly with the last frame too, from the weights just exported.
    base=(configs/tiny/cogvideox_tiny_i2v.yaml configs/tiny/train_first_last.yaml)
    encode clips_i2v latents_first_last "${base[@]}"
    train_network first_last image_to_video "${base[@]}"
}

train_continue() {
    local base=(configs/tiny/cogvideox_tiny.yaml configs/tiny/train_continue.yaml)
    dataset clips_continue --clips 6000 --seed 21 --begins 0 0.5 0.5 --motions "moving left" "moving right" "moving up" \
        "moving down" "moving in a circle" "moving in a circle" "moving in a circle" bouncing bouncing bouncing \
        "standing still" growing shrinking
    encode clips_continue latents_continue "${base[@]}"
    train_network continue continue "${base[@]}"
}

# Hard content: small shapes, corners and holes, motion in a circle.
hard_motions=("moving left" "moving right" "moving up" "moving down" growing shrinking
    "moving in a circle" "moving in a circle")
clips_more() {
    dataset clips_more --clips 12000 --seed 7 --sizes small small medium large \
        --shapes circle triangle square square ring ring cross cross \
        --motions "${hard_motions[@]}" bouncing "standing still"
}

# Arguments: the clips, their latents, and the configurations.
encode() {
    local clips=$1 latents=$2
    shift 2
    launch tools/precompute_latents.py --base "$@" --train_data "data/tiny/$clips" --output "data/tiny/$latents"
}

# Arguments: the name of the run, that of the exported weights, and the configurations.
train_network() {
    local name=$1 exported=$2 run
    shift 2
    launch sat/train_video.py --base "$@" --resume latest
    run=$(latest_run "$name")
    export_weights "$run/$(<"$run/latest")-ema" "$exported"
}

# One process with a GPU; on a CPU two processes of one thread are faster than one of two threads.
launch() {
    if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        "$python" "$@"
    else
        OMP_NUM_THREADS=1 "$python" tools/torchrun.py --standalone --nproc_per_node=2 "$@"
    fi
}

dataset() {
    local name=$1
    shift
    "$python" tools/make_shapes_dataset.py --output "data/tiny/$name" --frames 9 --size 64 64 "$@"
}

# Prints the folder of the run of this name that saved last.
latest_run() {
    local runs=("ckpts/tiny/$1"-[0-9]*/latest)
    dirname "$(ls -t "${runs[@]}" | head -n 1)"
}

export_weights() {
    "$python" tools/export_weights.py --input "$1" --output "assets/tiny/$2.safetensors" --dtype float16 --overwrite
    (cd assets/tiny && sha256sum t5/* ./*.safetensors | sed 's# \./# #' > SHA256SUMS)
}

parts=(text vae text_to_video image_to_video continue)
for part in "$@"; do
    if [[ " ${parts[*]} " != *" $part "* ]]; then
        echo "train_tiny: part '$part' does not exist; name some of ${parts[*]}, or none for all" >&2
        exit 2
    fi
done
python=$(bash tools/setup_environment.sh requirements.txt)
for part in "${@:-${parts[@]}}"; do
    "train_$part"
done
