"""Check types with mypy: rooms without errors stay so.

    python tests/type_checks.py         prints the errors of rooms that are checked, and exits with 1 if there are any
    python tests/type_checks.py --all   prints all errors, and their number by room

A room is a package or module as in `tests/architecture.py`. All rooms are checked but those in `NOT_YET`, which lists
how many errors each had when it was last counted. A room that has none left is to be taken out of the list.
"""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from architecture import ROOT

NOT_YET: dict[str, int] = {}
ERROR = re.compile(r"[^:]+\.py:\d+: error: ")


def room_of(line: str) -> str:
    """Return the room of an error, whose line begins with the path of the source file."""
    parts = Path(line.partition(":")[0]).with_suffix("").parts
    if parts[:2] == ("sat", "cogvideox_sat"):
        return parts[2]
    return parts[1] if parts[0] == "sat" else parts[0]


def errors(root: Path = ROOT) -> list[str]:
    """Return the lines of mypy's errors.

    Raises:
        RuntimeError: mypy could not check.
    """
    sources = [folder for folder in ("sat", "sgm", "vae_modules") if (root / folder).is_dir()]
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", *sources]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if ERROR.match(line)]
    if done.returncode != (1 if found else 0):  # 1 as well if Python finds no mypy
        raise RuntimeError(done.stdout + done.stderr)
    return found


def complaints(found: list[str], not_yet: Mapping[str, int]) -> list[str]:
    """Return what is wrong: the errors of rooms that are checked, and entries of `not_yet` that can go."""
    lines = [line for line in found if room_of(line) not in not_yet]
    clean = not_yet.keys() - {room_of(line) for line in found}
    return lines + [f"{room}: no errors, or no such room; take it out of NOT_YET" for room in sorted(clean)]


def main(arguments: list[str]) -> int:
    found = errors()
    if "--all" in arguments:
        counts = Counter(room_of(line) for line in found)
        sys.stdout.writelines(f"{line}\n" for line in [*found, *(f"{n} {room}" for room, n in counts.most_common())])
    lines = complaints(found, NOT_YET)
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
