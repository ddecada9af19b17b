#!/usr/bin/env bash
# Fine-tunes a model in one process, on a GPU or a CPU, by the command below or with the given arguments.
# Sets up the environment if needed, and by default draws and encodes the spirals that the tiny model learns.
# Paths are relative to the repository root.
#
#   bash finetune_single_gpu.sh                                                  the tiny model, on any machine
#   bash finetune_single_gpu.sh --base configs/cogvideox_2b_lora.yaml configs/sft.yaml --train_data DATA --seed 42
#   bash finetune_single_gpu.sh --base ... --resume latest                       resumes the last run
#
# Ctrl-C and SIGTERM finish the step and save a checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
environs= # for commands of the original, which begin with $environs
NPROC=1

run_cmd="python sat/train_video.py --base configs/tiny/cogvideox_tiny_lora.yaml configs/tiny/sft.yaml --seed 42"

source tools/run_command.sh
run "python sat/train_video.py" "$@"
