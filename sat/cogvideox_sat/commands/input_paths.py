"""Find input files and folders: in the current working directory, then in the repository.

Relative paths are resolved against the current working directory first and the repository's root second, so that a
command also works from `sat/`. Nothing here imports PyTorch.
"""

import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from cogvideox_sat.commands.launchers import is_first_process
from cogvideox_sat.files.refusals import why_unreadable
from cogvideox_sat.files.shipped import ROOT
from sgm.errors import UserError

logger = logging.getLogger(__name__)

_notes: list[str] = []  # sentences for the log


def find_input(path: str | Path, argument: str) -> Path | None:
    """Return the file or folder that `path` names; None if it does not exist.

    `tell_places` logs which one it is.

    Args:
        path: absolute, or relative to one of the two places; `~` is the home directory.
        argument: the argument that gives the path, for the log.

    Returns:
        `path` itself if it exists from the current working directory, else an absolute path.
    """
    path = Path(path)
    candidates = [path, ROOT / path]
    if _is_home(path):
        with suppress(RuntimeError):  # the user has no home directory
            candidates = [path.expanduser()]
    for candidate in candidates:
        with suppress(OSError, ValueError):  # a name that is too long for the file system, or holds NUL
            if candidate.exists():
                _tell_place(path, candidate, argument)
                return candidate
    return None


def required_input(path: str | Path, argument: str) -> Path:
    """Return the file or folder that `path` names, as `find_input` does.

    Raises:
        UserError: it exists in neither place.
    """
    found = find_input(path, argument)
    if found is None:
        raise UserError(not_found(argument, path))
    return found


def named_place(path: Path, found: Path) -> Path:
    """Return the path beside which outputs that belong to an input are written.

    This is `found` if the current working directory has the input. For an input from the repository's root it is the
    path as given, so that outputs go to the current working directory.
    """
    return found if path.is_absolute() or _is_home(path) else path


def _is_home(path: Path) -> bool:
    return path.parts[:1] == ("~",)


def _tell_place(path: Path, found: Path, argument: str) -> None:
    """Note where a relative path was found, unless there is only one place for it."""
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
    """Log where inputs were found.

    Call this once all inputs are found: if one is missing, its error is the only line. Only the first of several
    processes logs.
    """
    if is_first_process():
        for sentence in _notes:
            logger.info("%s", sentence)
    _notes.clear()


def find_pattern(pattern: str, argument: str) -> str:
    """Return a pattern of file names, relative to the place where it matches.

    Patterns are such as `shards/*.tar` or `{000..010}.tar`; `~` is the home directory. A pattern that matches in
    neither place is returned unchanged.
    """
    if _is_home(Path(pattern)):
        with suppress(RuntimeError):  # the user has no home directory
            return str(Path(pattern).expanduser())
    names = re.sub(r"\{[^}]*\}", "*", pattern)
    if Path(pattern).is_absolute() or _matches(Path(), names) or not _matches(ROOT, names):
        return pattern
    _note(f"{argument}: {pattern} is taken from {ROOT}")
    return str(ROOT / pattern)


def _matches(folder: Path, names: str) -> bool:
    try:
        return any(folder.glob(names))
    except (OSError, ValueError):  # pathlib refuses some patterns, such as `**.tar`
        return False


def located(path: Any, argument: str) -> Any:
    """Return `path` as found by `find_input`.

    A URL, a value that is not a path, and a path that exists in neither place are returned unchanged.
    """
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
    """Return the message for an input that exists in neither place, or cannot be read."""
    return f"{argument}: {path} {missing(path)}"


def missing(path: str | Path) -> str:
    """Return the end of that message: where the path does not exist, or why it is unreadable."""
    reason = why_unreadable(path)
    return f"does not exist{places(path)}" if reason is None else f"cannot be read: {reason}"


def places(path: str | Path) -> str:
    """Return the places where a path was looked for, for a message; "" if there is only one."""
    path = Path(path)
    if path.is_absolute() or _is_home(path) or Path.cwd() == ROOT:
        return ""
    return f", neither in {Path.cwd()} nor in {ROOT}"
