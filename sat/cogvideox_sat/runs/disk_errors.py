"""What a run says when a checkpoint cannot be written. Nothing here imports PyTorch."""

import errno
from pathlib import Path

from safetensors import SafetensorError

from cogvideox_sat.files.sizes import free_bytes, room_in_words
from sgm.errors import UserError

WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)  # the last is how torch.save reports a full disk


def is_disk_full(error: Exception) -> bool:
    """Return whether one of `WRITE_ERRORS` says that the disk is full, in the words of the library that wrote."""
    if getattr(error, "errno", None) == errno.ENOSPC:
        return True
    return "space left" in str(error) or "write failed" in str(error)


def check_room_for_checkpoint(path: Path, needed: int) -> None:
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
    return UserError(
        f"cannot write {path}: the disk is full: {room_in_words(path, needed)}; the previous checkpoint is kept: make "
        "room (keep_last: N helps) and go on with --resume latest"
    )
