"""Writing a checkpoint of the network as `load:` takes it, one tensor in memory at a time, complete or not at all.

{folder}/latest                       the name of the one iteration
{folder}/1/mp_rank_00_model_states.pt
"""

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from network_files import NETWORK_PREFIX, checkpoint_file
from sgm.errors import UserError
from sgm.weights import module_weights, read_state_dict
from whole_files import new_folder

ITERATION = "1"
FILE = "mp_rank_00_model_states.pt"
# Of zip archives: the header before a name, that of an extra field, and the mark of fields that PyTorch pads with.
ENTRY_HEADER, EXTRA_HEADER, PADDING_ID = struct.Struct("<4s5H3L2H"), struct.Struct("<2H"), 0x4246
ALIGNMENT = 64  # bytes


def write_checkpoint(
    folder: Path, like: Mapping[str, Tensor], tensor: Callable[[str], Tensor], texts: Mapping[str, str] | None = None
) -> None:
    """Write the tensors of a network into a checkpoint folder, which takes the place of one that exists.

    Args:
        like: by the network's name, a tensor of the shape and the dtype of the one to write; its values are not used.
        tensor: gives that tensor; called once for each name, in order.
        texts: contents of further files in the folder, by name.

    Raises:
        UserError: it cannot be written.
    """
    with new_folder(folder, sum(value.nbytes for value in like.values())) as part:
        (part / ITERATION).mkdir()
        write_tensors(part / ITERATION / FILE, like, tensor)
        (part / "latest").write_text(ITERATION)
        for name, text in (texts or {}).items():
            (part / name).write_text(text, encoding="utf-8")
        check_written(part, like)


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
    if not same or not _checksums_agree(file):
        raise UserError(f"{file} does not read back as it was written; nothing is left of it")


def _checksums_agree(file: Path) -> bool:
    """Whether what is on the disk is what was in memory, of which the archive's checksums are."""
    with zipfile.ZipFile(file) as archive:
        try:
            for entry in tqdm(archive.infolist(), desc="reading back", unit="tensor", leave=False):
                with archive.open(entry) as record:
                    while record.read(2**24):
                        pass
        except zipfile.BadZipFile:
            return False
    return True
