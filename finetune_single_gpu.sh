#!/usr/bin/env bash
# Fine-tunes a model in one process, on a GPU or a CPU: with the command below, or with the arguments given here.
# Sets up the environment where needed, and draws and encodes the spirals that the tiny model is taught by default.
# Paths are relative to the repository root.
#
#   bash finetune_single_gpu.sh                                                  the tiny model, on any machine
#   bash finetune_single_gpu.sh --base configs/cogvideox_2b_lora.yaml configs/sft.yaml --train_data DATA --seed 42
#   bash finetune_single_gpu.sh --base ... --resume latest                       goes on with the last run
#
# Ctrl-C and SIGTERM finish the step and save.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
environs= # for commands of the original, which begin with $environs
NPROC=1

run_cmd="python sat/train_video.py --base configs/tiny/cogvideox_tiny_lora.yaml configs/tiny/sft.yaml --seed 42"

source tools/run_command.sh
run "python sat/train_video.py" "$@"
