"""Errors of checkpoints that cannot be written, without PyTorch."""

import errno
from pathlib import Path

from safetensors import SafetensorError

from cogvideox_sat.files.sizes import free_bytes, room_in_words
from sgm.errors import UserError

WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)  # torch.save reports a full disk as RuntimeError


def is_disk_full(error: Exception) -> bool:
    """Return whether one of `WRITE_ERRORS` means that the disk is full."""
    if getattr(error, "errno", None) == errno.ENOSPC:
        return True
    return "space left" in str(error) or "write failed" in str(error)


def check_room_for_checkpoint(path: Path, needed: int) -> None:
    """Check that the disk has `needed` bytes free for the checkpoint, else raise UserError."""
    if free_bytes(path) < needed:
        raise disk_full(path, needed)


def cannot_write(path: Path, error: Exception, needed: int | None = None) -> UserError:
    """Return the error to raise after one of `WRITE_ERRORS`.

    Args:
        path: path of the checkpoint.
        needed: size of the checkpoint in bytes.
    """
    if isinstance(error, UserError):
        return error
    if is_disk_full(error):
        return disk_full(path, needed)
    return UserError(f"cannot write {path}: {' '.join(str(error).split())}; the previous checkpoint is kept")


def disk_full(path: Path, needed: int | None) -> UserError:
    """Return the error for a full disk."""
    return UserError(
        f"cannot write {path}: the disk is full: {room_in_words(path, needed)}; the previous checkpoint is kept: make "
        "room (keep_last: N helps) and continue with --resume latest"
    )
