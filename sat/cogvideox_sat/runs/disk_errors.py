"""What a run says when a checkpoint cannot be written. Nothing here imports PyTorch."""

import errno
import shutil
from pathlib import Path

from safetensors import SafetensorError

from sgm.errors import UserError

WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)  # the last is how torch.save reports a full disk
GIB = 2**30


def is_disk_full(error: Exception) -> bool:
    """Return whether one of `WRITE_ERRORS` says that the disk is full, in the words of the library that wrote."""
    if getattr(error, "errno", None) == errno.ENOSPC:
        return True
    return "space left" in str(error) or "write failed" in str(error)


def check_room(path: Path, needed: int) -> None:
    """Check that the disk has `needed` bytes free for the checkpoint `path`, else raise UserError."""
    if free_bytes(path) < needed:
        raise disk_full(path, needed)


def cannot_write(path: Path, error: Exception, needed: int | None = None) -> UserError:
    """Return the error to raise after one of `WRITE_ERRORS` of the checkpoint `path`, which takes `needed` bytes."""
    if isinstance(error, UserError):
        return error
    if is_disk_full(error):
        return disk_full(path, needed)
    return UserError(f"cannot write {path}: {' '.join(str(error).split())}; the previous checkpoint is kept")


def disk_full(path: Path, needed: int | None) -> UserError:
    sizes = f"{free_bytes(path) / GIB:.2f} GiB are free"
    if needed is not None:
        sizes = f"{needed / GIB:.2f} GiB are needed, {sizes}"
    return UserError(
        f"cannot write {path}: the disk is full: {sizes}; the previous checkpoint is kept: make room (keep_last: N "
        "helps) and go on with --resume latest"
    )


def free_bytes(path: Path) -> int:
    """Return the bytes that are free where `path` is to be; its folder may have been removed during the run."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    return shutil.disk_usage(folder).free
