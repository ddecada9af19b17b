"""Files and folders that appear when they are complete, or not at all. Nothing here imports PyTorch."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from cogvideox_sat.files.sizes import free_bytes, room_in_words
from sgm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SPARE_BYTES = 1 << 22  # of a disk, for headers and small files


@contextmanager
def replaced_when_complete(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; it takes the name `path`, on disk, when the block ends well.

    After an exception it is removed. Missing parent folders are made.

    Raises:
        UserError: the operating system refuses (permissions, disk full, ...).
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with reported_as_user_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.touch()
        yield part
        with reported_as_user_error(path):
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path, needed: int) -> Iterator[Path]:
    """A hidden folder beside `folder` to write `needed` bytes to; it takes its name, and place, when the block ends
    well, and is removed otherwise, with parent folders that were made for it.

    Raises:
        UserError: the operating system refuses, or the disk has no room.
    """
    with no_empty_folders(folder), reported_as_user_error(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_room(folder, needed)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part") as temporary:
            part = Path(temporary) / "new"
            part.mkdir()
            yield part
            if folder.exists():
                folder.rename(Path(temporary) / "old")
            part.rename(folder)


@contextmanager
def new_file(path: Path, needed: int) -> Iterator[Path]:
    """`new_folder` for a file."""
    with no_empty_folders(path), reported_as_user_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path, needed)
        with replaced_when_complete(path) as part:
            yield part


def write_safetensors(path: Path, weights: "Mapping[str, Tensor]") -> None:
    """Write a `new_file` of contiguous tensors by name.

    Raises:
        UserError: the operating system refuses, or the disk has no room.
    """
    from safetensors.torch import save

    with new_file(path, sum(tensor.nbytes for tensor in weights.values())) as part:
        part.write_bytes(save(weights))  # save_file would make it readable by its owner only


def check_room(path: Path, needed: int) -> None:
    """Raises UserError unless the disk of the folder of `path` has `needed` bytes free, and some to spare."""
    needed += SPARE_BYTES
    if free_bytes(path) < needed:
        raise UserError(f"cannot write {path}: {room_in_words(path, needed)}: make room")


@contextmanager
def no_empty_folders(path: Path) -> Iterator[None]:
    """Removes, after an exception, the parents of `path` that were made in the block."""
    missing = [parent for parent in path.absolute().parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # never made, or someone else has put something there
                parent.rmdir()
        raise


@contextmanager
def reported_as_user_error(path: Path) -> Iterator[None]:
    """Turns what the operating system refuses, however libraries say it, into a UserError about `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"cannot write {path}: {error}") from error
