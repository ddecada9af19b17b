#!/usr/bin/env bash
# Trains the parts of the tiny model from nothing, on generated clips: the VAE and the text encoder, or the one named.
# What is done already is left as it is, and a training that was interrupted goes on where it was.
# Sets up the environment where needed.
#
#   bash tools/train_tiny.sh            both
#   bash tools/train_tiny.sh vae        checkpoints/tiny_trained/vae/3d-vae.pt
#   bash tools/train_tiny.sh text       checkpoints/tiny_trained/t5
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' tools/train_tiny.sh
    exit
fi

train_vae() {
    # Images first: a step with them takes a fraction of the time, and teaches all but motion.
    dataset vae_images --images 6000 --clips 8
    dataset vae_clips --clips 3000 --seed 1
    dataset vae_valid --clips 32 --seed 2 --split held_out
    "$python" sat/train_vae.py --base configs/tiny/vae_images.yaml --resume latest
    take_weights vae_tiny_images checkpoints/tiny_trained/vae_images
    "$python" sat/train_vae.py --base configs/tiny/vae.yaml --resume latest
    take_weights vae_tiny checkpoints/tiny_trained/vae_clips
    "$python" sat/train_vae.py --base configs/tiny/vae_final.yaml --resume latest
    take_weights vae_tiny_final checkpoints/tiny_trained/vae
}

train_text() {
    if [[ ! -e checkpoints/tiny_trained/t5/spiece.model ]]; then
        "$python" tools/train_text_encoder.py --output checkpoints/tiny_trained/t5
    fi
}

dataset() {
    local name=$1
    shift
    "$python" tools/make_shapes_dataset.py --output "data/tiny/$name" --frames 9 --size 64 64 "$@"
}

# The weights of the run of this name that saved last go to a folder.
take_weights() {
    local runs
    runs=("ckpts/tiny/$1"-[0-9]*/latest)
    mkdir -p "$2"
    cp "$(dirname "$(ls -t "${runs[@]}" | head -n 1)")/3d-vae.pt" "$2/3d-vae.pt"
}

case "${1:-all}" in
    all) stages=(vae text) ;;
    vae | text) stages=("$1") ;;
    *) echo "train_tiny: there is no stage '$1': name vae or text, or none for both" >&2; exit 2 ;;
esac
python=$(bash tools/setup_environment.sh requirements.txt)
for stage in "${stages[@]}"; do
    "train_$stage"
done
