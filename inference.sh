#!/usr/bin/env bash
# Samples videos, by the command below or with the given arguments.
# Sets up the environment if needed. The tiny model is in assets/tiny.
# Paths are relative to the repository root.
#
#   bash inference.sh                                                            the tiny model, on any machine
#   bash inference.sh --base configs/cogvideox_5b.yaml configs/inference.yaml --seed 42
#   NPROC=4 bash inference.sh --base ...                                         on four GPUs, which share the prompts
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
environs= # for commands of the original, which begin with $environs

run_cmd="python sat/sample_video.py --base configs/tiny/cogvideox_tiny.yaml configs/tiny/inference.yaml --seed 42"

source tools/run_command.sh
run "python sat/sample_video.py" "$@"
