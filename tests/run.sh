#!/usr/bin/env bash
# Sets up the environment if needed, then checks the layers (tests/architecture.py), the docstrings (tests/prose.py), the
# style (ruff), the spelling (codespell) and the types (mypy, tests/type_checks.py), and runs the tests (pytest), with two
# processes more than cores, at most eight.
# Other arguments go to pytest; paths are relative to the repository root.
#
#   bash tests/run.sh
#   bash tests/run.sh tests/sgm -k sampler
#   bash tests/run.sh --quick                  without tests that are slow or start several processes
#   bash tests/run.sh --all                    all cases of all tests; 300 changed configurations, not 60; 20 kills of each kind of run
#
# --long          the same as --all
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' tests/run.sh
    exit
fi

case ${1:-} in
    --quick)
        shift
        set -- -m "not slow and not distributed and not long" "$@"
        ;;
    --all | --long)
        shift
        set -- --fuzz_cases 300 --soak_kills 20 "$@"
        ;;
    *)
        set -- -m "not long" "$@"
        ;;
esac

python=$(bash tools/setup_environment.sh requirements.txt requirements-web.txt tests/requirements.txt)
export PATH="$(dirname "$python"):$PATH" TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
unset PYTHONDONTWRITEBYTECODE # hundreds of processes import the same modules

style=0
"$python" tests/architecture.py || style=$?
"$python" tests/prose.py || style=$?
"$python" -m ruff check || style=$?
"$python" -m codespell_lib benchmarks configs sat sgm tests tools vae_modules ./*.md docs || style=$?

# Types are checked while the tests run, and their errors are printed after the tests.
types=$(mktemp)
"$python" tests/type_checks.py >"$types" 2>&1 &
checker=$!
trap 'kill "$checker" 2>/dev/null || true; rm -f "$types"' EXIT

# The tests of a file share its fixtures, so that they stay together; tests/conftest.py puts the long files first. A test
# spends a third of its time waiting, for a clip that hangs, a server or a process; another test then uses its core.
tests=0 processes=$(($(getconf _NPROCESSORS_ONLN) + 2))
"$python" -m pytest --numprocesses "$((processes < 8 ? processes : 8))" --dist loadfile --no-loadscope-reorder "$@" || tests=$?
wait "$checker" || style=$?
cat "$types"
((tests == 0)) || exit "$tests"
exit "$style"
