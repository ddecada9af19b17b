#!/usr/bin/env bash
# Sets up the environment if needed, then runs the tests (pytest), with two processes more than cores, at most eight, and
# beside them checks the layers (tests/architecture.py), that each module has tests (tests/mirror.py), the docstrings
# (tests/prose.py), the style (ruff), the spelling (codespell) and the types (mypy, tests/type_checks.py).
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

# The checks run beside the tests, and what they find is printed last.
checks() {
    local failed=0
    "$python" tests/architecture.py || failed=$?
    "$python" tests/mirror.py || failed=$?
    "$python" tests/prose.py || failed=$?
    "$python" -m ruff check || failed=$?
    "$python" -m codespell_lib benchmarks configs sat sgm tests tools vae_modules ./*.md docs || failed=$?
    "$python" tests/type_checks.py || failed=$?
    return "$failed"
}
found=$(mktemp)
checks >"$found" 2>&1 &
checker=$!
trap 'kill "$checker" 2>/dev/null || true; rm -f "$found"' EXIT

# The tests of a file share its fixtures, so that they stay together; tests/conftest.py puts the long files first. A test
# spends a third of its time waiting, for a clip that hangs, a server or a process; another test then uses its core.
tests=0 style=0 processes=$(($(getconf _NPROCESSORS_ONLN) + 2))
worker=popen
if [[ ! -e /dev/nvidia0 ]]; then # the driver of a GPU does not work after a fork
    worker="popen//python=$(printf '%q' "$python") tests/forked_worker.py"
fi
export PYTEST_XDIST_TESTRUNUID=$$-$(date +%s) # all workers use the same two servers of tests/process_server.py
"$python" -m pytest --tx "$((processes < 8 ? processes : 8))*$worker" --testrunuid "$PYTEST_XDIST_TESTRUNUID" \
    -W ignore::pytest.PytestAssertRewriteWarning --dist loadfile --no-loadscope-reorder "$@" || tests=$?
wait "$checker" || style=$?
cat "$found"
((tests == 0)) || exit "$tests"
exit "$style"
