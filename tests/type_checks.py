"""Check types with mypy, all modules by the flags in `pyproject.toml`.

python tests/type_checks.py    prints the errors, and exits with 1 if there are any
"""

import re
import subprocess
import sys
from pathlib import Path

from architecture import ROOT

ERROR = re.compile(r"[^:]+\.py:\d+: error: ")


def errors(root: Path = ROOT) -> list[str]:
    """Return the lines of mypy's errors.

    Raises:
        RuntimeError: mypy could not check.
    """
    sources = [folder for folder in ("sat", "sgm", "vae_modules") if (root / folder).is_dir()]
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", *sources]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if ERROR.match(line)]
    if done.returncode != (1 if found else 0):  # also 1 if mypy is not installed
        raise RuntimeError(done.stdout + done.stderr)
    return found


def main() -> int:
    found = errors()
    sys.stdout.writelines(f"{line}\n" for line in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
