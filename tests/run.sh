#!/usr/bin/env bash
# Sets up the environment where needed, then checks the style (ruff) and runs the tests (pytest), one process a core,
# at most eight. Arguments go to pytest; paths are relative to the repository root.
#
#   bash tests/run.sh
#   bash tests/run.sh tests/sgm -k sampler
#   bash tests/run.sh --long                   300 changed configurations rather than 60: tests/README.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' tests/run.sh
    exit
fi

if [[ ${1:-} == --long ]]; then
    shift
    set -- "$@" --fuzz_cases 300
fi

python=$(bash tools/setup_environment.sh requirements.txt tests/requirements.txt)
export PATH="$(dirname "$python"):$PATH" TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

style=0
"$python" -m ruff check || style=$?
# The tests of a file share its fixtures, so they stay together.
"$python" -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile "$@"
exit "$style"
