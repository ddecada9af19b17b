#!/usr/bin/env bash
# Prints the path of a Python that has the packages of the given requirement files: that of the active environment if it
# has them, otherwise that of .venv in the repository root, which is made or completed first. All other output goes to
# standard error.
#
#   python=$(bash tools/setup_environment.sh requirements.txt tests/requirements.txt)
#
# --check         install nothing; fail if no environment is ready
# PYTHON=...      the interpreter to use or to make .venv with (default: python3, python, python3.14 ... 3.11)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit
fi

probe='import sys; print(sys.executable); sys.exit(sys.version_info < (3, 11))'
candidates=(python3 python python3.14 python3.13 python3.12 python3.11)
if [[ ${PYTHON:-} ]]; then
    candidates=("$PYTHON")
fi
for candidate in "${candidates[@]}"; do
    if python=$("$candidate" -ISc "$probe" 2>/dev/null); then
        exec "$python" "$here/setup_environment.py" "$@"
    fi
done
echo "setup: ${PYTHON:-python3} does not exist or is older than 3.11; install Python 3.11 or newer, or set PYTHON=..." >&2
exit 1
