"""Show a page in the browser after setting up what it needs; see `--help`.

`cogvideox_sat.web.command` does the work.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ("requirements.txt", "requirements-web.txt")


def environment_python(install: bool) -> str | None:
    """Return the Python that has what the page needs; None: none has, and none is made."""
    check = [] if install else ["--check"]
    command = ["bash", str(ROOT / "tools" / "setup_environment.sh"), *check, *REQUIREMENTS]
    told = None if install else subprocess.DEVNULL
    environment = {**os.environ, "PYTHON": os.environ.get("PYTHON") or sys.executable}
    ready = subprocess.run(command, stdout=subprocess.PIPE, stderr=told, text=True, env=environment)
    return None if ready.returncode else ready.stdout.strip()


if __name__ == "__main__":
    is_asked_for_help = bool({"-h", "--help"} & set(sys.argv[1:]))  # which must not install anything
    python = environment_python(install=not is_asked_for_help)
    if python is None and not is_asked_for_help:
        sys.exit(2)
    if python is not None and Path(python) != Path(sys.executable):
        os.execv(python, [python, __file__, *sys.argv[1:]])

sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.web.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
