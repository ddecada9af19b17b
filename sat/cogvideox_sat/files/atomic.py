"""Write files and folders atomically: they appear when they are complete, or not at all.

Nothing here imports PyTorch.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from cogvideox_sat.files.refusals import refusal
from cogvideox_sat.files.sizes import free_bytes, room_in_words
from sgm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SPARE_BYTES = 1 << 22  # bytes to keep free on a disk for headers and small files


@contextmanager
def replaced_when_complete(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`, which replaces `path` when the block succeeds.

    The file's content is on the disk before it is renamed. After an exception the temporary file is removed. Missing
    parent folders are made.

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
            sync(part)
            part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: bytes, or text in UTF-8; missing parent folders are made.

    Raises:
        UserError: the operating system refuses (permissions, disk full, ...).
    """
    with replaced_when_complete(path) as part, reported_as_user_error(path):
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def new_folder(folder: Path, needed: int) -> Iterator[Path]:
    """Yield a hidden folder beside `folder`, which replaces `folder` when the block succeeds.

    Its content is on the disk before it is renamed. After an exception the hidden folder and the parent folders made
    for it are removed. If `folder` is a symbolic link, the folder that the link names is replaced or made.

    Args:
        needed: bytes that will be written.

    Raises:
        UserError: the operating system refuses, or the disk has too little free space.
    """
    with reported_as_user_error(folder), no_empty_folders(folder):
        folder = Path(os.path.realpath(folder)) if folder.is_symlink() else folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_room(folder, needed)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part") as temporary:
            part, old = Path(temporary) / "new", Path(temporary) / "old"
            part.mkdir()
            yield part
            sync_tree(part)
            try:
                if folder.exists():
                    folder.rename(old)
                part.rename(folder)
            except BaseException:
                if old.exists():  # else it would be removed with the temporary folder
                    old.rename(folder)
                raise


@contextmanager
def new_file(path: Path, needed: int) -> Iterator[Path]:
    """Yield a temporary file beside `path`; otherwise the same as `new_folder`."""
    with reported_as_user_error(path), no_empty_folders(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path, needed)
        with replaced_when_complete(path) as part:
            yield part


def write_safetensors(path: Path, weights: "Mapping[str, Tensor]") -> None:
    """Write contiguous tensors by name to a safetensors file, atomically.

    A tensor with several names is written once for each, since safetensors refuses tensors that share memory.

    Raises:
        UserError: the operating system refuses, or the disk has too little free space.
    """
    from safetensors.torch import save

    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in weights.items():
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    with new_file(path, sum(tensor.nbytes for tensor in apart.values())) as part:
        part.write_bytes(save(apart))  # save_file would make the file readable only by its owner


def sync_tree(folder: Path) -> None:
    """Write a folder and everything in it from the system's cache to the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            sync(path)


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, from the system's cache to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_room(path: Path, needed: int) -> None:
    """Check that a disk has `needed` bytes and some to spare for `path`, else raise UserError."""
    needed += SPARE_BYTES
    if free_bytes(path) < needed:
        raise UserError(f"cannot write {path}: {room_in_words(path, needed)}; make room")


@contextmanager
def no_empty_folders(path: Path) -> Iterator[None]:
    """Remove parents of `path` that were made in the block, if the block raises an exception."""
    missing = [parent for parent in path.absolute().parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # never made, or not empty
                parent.rmdir()
        raise


@contextmanager
def reported_as_user_error(path: Path) -> Iterator[None]:
    """Raise refusals of the operating system in the block as UserErrors about `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {refusal(error)}") from error
    except SafetensorError as error:
        raise UserError(f"cannot write {path}: {error}") from error
