"""Find files and folders that are read: relative to the current working directory, then relative to the root of
the repository, so that a command works from `sat/` as well.

Nothing here imports PyTorch.
"""

import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from cogvideox_sat.commands.launchers import is_first_process
from cogvideox_sat.files.shipped import ROOT
from sgm.errors import UserError

logger = logging.getLogger(__name__)

_notes: list[str] = []  # sentences for the log


def find_input(path: str | Path, argument: str) -> Path | None:
    """Return the file or folder that `path` means; None if it does not exist. `tell_places` logs which one it is.

    Args:
        path: an absolute path stands for itself; `~` is the home directory.
        argument: what names the path, for the log.

    Returns:
        `path` as it is if it exists from the current working directory, else an absolute path.
    """
    path = Path(path)
    candidates = [path, ROOT / path]
    if _is_home(path):
        with suppress(RuntimeError):  # there is no home directory
            candidates = [path.expanduser()]
    for candidate in candidates:
        with suppress(OSError, ValueError):  # a name that is too long for the file system, or holds NUL
            if candidate.exists():
                _tell_place(path, candidate, argument)
                return candidate
    return None


def required_input(path: str | Path, argument: str) -> Path:
    """Return the file or folder that `path` means, as `find_input` does.

    Raises:
        UserError: it is in neither place.
    """
    found = find_input(path, argument)
    if found is None:
        raise UserError(not_found(argument, path))
    return found


def named_place(path: Path, found: Path) -> Path:
    """Return the path beside which outputs go that belong beside an input: `found`, if the current folder has it.

    For an input from the repository's root it is the path as it was given: outputs go to the current working directory.
    """
    return found if path.is_absolute() or _is_home(path) else path


def _is_home(path: Path) -> bool:
    return path.parts[:1] == ("~",)


def _tell_place(path: Path, found: Path, argument: str) -> None:
    """Log where a relative path was found, unless that is the only place it can be."""
    if path.is_absolute() or _is_home(path) or Path.cwd() == ROOT:
        return
    if found.is_absolute():
        _note(f"{argument}: {path} is taken from {ROOT}")
    elif (ROOT / path).exists():
        _note(f"{argument}: {path} is taken from the current working directory; {ROOT} has one too")


def _note(sentence: str) -> None:
    if sentence not in _notes:
        _notes.append(sentence)


def tell_places() -> None:
    """Log where inputs were found, once all of them are: a mistake among them is to be the only line.

    The first of several processes speaks for all.
    """
    if is_first_process():
        for sentence in _notes:
            logger.info("%s", sentence)
    _notes.clear()


def find_pattern(pattern: str, argument: str) -> str:
    """Return a pattern of file names (`shards/*.tar`, `{000..010}.tar`) such that it matches, as `find_input` does.

    A pattern that matches nothing is returned as it is.
    """
    names = re.sub(r"\{[^}]*\}", "*", pattern)
    if Path(pattern).is_absolute() or any(Path().glob(names)) or not any(ROOT.glob(names)):
        return pattern
    _note(f"{argument}: {pattern} is taken from {ROOT}")
    return str(ROOT / pattern)


def located(path: Any, argument: str) -> Any:
    """Return `path` where it exists; what is no path, a URL, or in neither place is returned as it is."""
    if isinstance(path, list):
        return [located(item, argument) for item in path]
    if isinstance(path, dict) and "path" in path:
        return {**path, "path": located(path["path"], argument)}
    if not isinstance(path, str) or not path or "://" in path:
        return path
    if any(char in path for char in "{*?["):
        return find_pattern(path, argument)
    found = find_input(path, argument)
    return path if found is None else str(found)


def not_found(argument: str, path: str | Path) -> str:
    """Return the message for an input that is in neither place."""
    return f"{argument}: {path} does not exist{places(path)}"


def places(path: str | Path) -> str:
    """Return the end of such a message, which names both places; nothing where there is only one."""
    path = Path(path)
    if path.is_absolute() or _is_home(path) or Path.cwd() == ROOT:
        return ""
    return f", neither in {Path.cwd()} nor in {ROOT}"
