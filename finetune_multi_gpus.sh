#!/usr/bin/env bash
# Fine-tunes a model on several GPUs of one or more machines, by the command below or with the given arguments.
# Sets up the environment if needed, and by default draws and encodes the spirals that the tiny model learns.
# Paths are relative to the repository root.
#
#   bash finetune_multi_gpus.sh --base configs/cogvideox_2b_lora.yaml configs/sft.yaml --train_data DATA --seed 42
#   NPROC=4 bash finetune_multi_gpus.sh --base ...          on four GPUs (default: all; without any, one process)
#   bash finetune_multi_gpus.sh --base ... --resume latest  resumes the last run
#
# On several machines run the same command on each, with torchrun's arguments in TORCHRUN_ARGS, and `save` on shared
# storage:
#
#   TORCHRUN_ARGS="--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500" bash finetune_multi_gpus.sh --base ...
#
# SIGTERM finishes the step and saves a checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
environs= # for commands of the original, which begin with $environs
NPROC=${NPROC:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c ^GPU || true)}
if [[ -z ${PYTORCH_ALLOC_CONF+set} ]]; then
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True} # less fragmentation
fi
launch="torchrun ${TORCHRUN_ARGS:---standalone} --nproc_per_node=$((NPROC > 0 ? NPROC : 1)) sat/train_video.py"

run_cmd="$launch --base configs/tiny/cogvideox_tiny_lora.yaml configs/tiny/sft.yaml --seed 42"

source tools/run_command.sh
run "$launch" "$@"
