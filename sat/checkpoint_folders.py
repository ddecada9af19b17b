"""Writing a checkpoint of the network as `load:` takes it, one tensor in memory at a time, complete or not at all.

{folder}/latest                       the name of the one iteration
{folder}/1/mp_rank_00_model_states.pt
"""

import io
import pickle
import shutil
import struct
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from network_files import NETWORK_PREFIX, checkpoint_file
from sgm.errors import UserError
from sgm.weights import module_weights, read_state_dict
from video_output import replaced_when_complete

ITERATION = "1"
FILE = "mp_rank_00_model_states.pt"
# Of zip archives: the header before a name, that of an extra field, and the mark of fields that PyTorch pads with.
ENTRY_HEADER, EXTRA_HEADER, PADDING_ID = struct.Struct("<4s5H3L2H"), struct.Struct("<2H"), 0x4246
ALIGNMENT = 64  # bytes
SPARE_BYTES = 1 << 20  # of a disk, for what is not tensors


def write_checkpoint(
    folder: Path, like: Mapping[str, Tensor], tensor: Callable[[str], Tensor], overwrite: bool, **texts: str
) -> None:
    """Write the tensors of a network into a new checkpoint folder.

    Args:
        like: by the network's name, a tensor of the shape and the dtype of the one to write; its values are not used.
        tensor: gives that tensor; called once for each name, in order.
        overwrite: replace a folder that exists.
        texts: contents of further files in the folder, by name, `__` for a dot.

    Raises:
        UserError: the folder exists, or cannot be written.
    """
    check_new(folder, overwrite)
    needed = sum(value.nbytes for value in like.values()) + SPARE_BYTES
    with new_folder(folder, needed) as part:
        (part / ITERATION).mkdir()
        write_tensors(part / ITERATION / FILE, like, tensor)
        (part / "latest").write_text(ITERATION)
        for name, text in texts.items():
            (part / name.replace("__", ".")).write_text(text, encoding="utf-8")
        check_written(part, like)


def check_new(path: Path, overwrite: bool) -> None:
    """Raises UserError if `path` exists and is not to be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: give --overwrite to replace it, or another name")


@contextmanager
def new_folder(folder: Path, needed: int) -> Iterator[Path]:
    """A hidden folder beside `folder` to write `needed` bytes to; it takes its name, and place, when the block ends
    well, and is removed otherwise.

    Raises:
        UserError: the operating system refuses, or the disk has no room.
    """
    with no_empty_folders(folder), os_errors_reported(folder):
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
    with no_empty_folders(path), os_errors_reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path, needed)
        with replaced_when_complete(path) as part:
            yield part


def check_room(path: Path, needed: int) -> None:
    """Raises UserError unless the disk of the folder of `path` has `needed` bytes free."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise UserError(
            f"cannot write {path}: {needed / 2**30:.2f} GiB are needed, {free / 2**30:.2f} are free: make room"
        )


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
def os_errors_reported(path: Path) -> Iterator[None]:
    """Turns what the operating system refuses, however libraries say it, into a UserError about `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"cannot write {path}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch's file format
# ---------------------------------------------------------------------------------------------------------------------


def write_tensors(
    path: Path,
    like: Mapping[str, Tensor],
    tensor: Callable[[str], Tensor],
    key: str = "module",
    prefix: str = NETWORK_PREFIX,
) -> None:
    """What `torch.save({key: ...})` writes, names prefixed, from tensors that need not exist at the same time.

    That is an archive of a pickle, with the names, dtypes and shapes, and of the bytes of one tensor after another.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (
            ("data.pkl", _pickled(like, key, prefix)),
            ("byteorder", sys.byteorder.encode()),
            ("version", b"3\n"),
        ):
            _write_record(archive, name, content)
        for number, name in enumerate(tqdm(like, desc="writing", unit="tensor", leave=False)):
            value = tensor(name)
            if value.shape != like[name].shape or value.dtype != like[name].dtype:
                raise ValueError(f"{name} is {value.dtype} {list(value.shape)}, not as announced")
            _write_record(archive, f"data/{number}", value.contiguous().view(-1).view(torch.uint8).numpy().data)


def _write_record(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Append an entry whose content starts at a multiple of `ALIGNMENT`, so that it can be mapped."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    entry.file_size = len(content)
    start = archive.start_dir + ENTRY_HEADER.size + len(entry.filename)
    padding = -(start + EXTRA_HEADER.size) % ALIGNMENT
    entry.extra = EXTRA_HEADER.pack(PADDING_ID, padding) + bytes(padding)
    with archive.open(entry, "w") as record:
        record.write(content)


class _Storage:
    """Stands for the storage of a tensor while its name and shape are pickled."""

    def __init__(self, number: int, like: Tensor):
        kind = torch.storage._dtype_to_storage_type_map()[like.dtype]
        self.reference = ("storage", getattr(torch, kind), str(number), "cpu", like.numel())


class _Tensor:
    def __init__(self, number: int, like: Tensor):
        self.storage, self.like = _Storage(number, like), like

    def __reduce__(self) -> tuple[Any, ...]:
        stride = torch.empty(self.like.shape, device="meta").stride()
        arguments = (self.storage, 0, tuple(self.like.shape), stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        return obj.reference if isinstance(obj, _Storage) else None


def _pickled(like: Mapping[str, Tensor], key: str, prefix: str) -> bytes:
    buffer = io.BytesIO()
    module = {prefix + name: _Tensor(number, value) for number, (name, value) in enumerate(like.items())}
    _Pickler(buffer, protocol=2).dump({key: module})
    return buffer.getvalue()


def check_written(folder: Path, like: Mapping[str, Tensor]) -> None:
    """Raises UserError unless the checkpoint in `folder` reads back as it was written."""
    file, _ = checkpoint_file(folder)
    written = module_weights(read_state_dict(file), what=str(file))
    expected = {NETWORK_PREFIX + name: (tensor.shape, tensor.dtype) for name, tensor in like.items()}
    same = {name: (tensor.shape, tensor.dtype) for name, tensor in written.items()} == expected
    if not same or zipfile.ZipFile(file).testzip():  # the checksums are of what was in memory
        raise UserError(f"{file} does not read back as it was written; nothing is left of it")
