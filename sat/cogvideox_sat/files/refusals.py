"""Say in words what the operating system refuses, and what the user can do.

Nothing here imports PyTorch.
"""

import errno
import os
import stat
from pathlib import Path

_PERMISSION = "change the permissions or name another path"
_REMEDIES = {
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "name a path on a disk that can be written to",
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.ENAMETOOLONG: "shorten it",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "a part of the path is a file: name another path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def refusal(error: OSError) -> str:
    """Return the reason of an error, and what to do: "Permission denied; change ..."."""
    reason, remedy = error.strerror or str(error), _REMEDIES.get(error.errno or 0)
    return f"{reason}; {remedy}" if remedy else reason


def why_unreadable(path: str | Path) -> str | None:
    """Return why a file or folder cannot be read; None if it can, or does not exist.

    The reasons are missing permissions, also of a folder above, a name that is too long, a loop of links, and a disk
    that fails. `Path.exists` of Python 3.11 raises these errors.
    """
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)  # noqa: PTH116
        if not os.access(path, os.R_OK | (os.X_OK if is_folder else 0)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: the path holds NUL
        return None
    except OSError as error:
        return refusal(error)
    return None
