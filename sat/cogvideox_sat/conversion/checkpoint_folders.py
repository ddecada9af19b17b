"""Write a checkpoint of the network for `load:`, atomically and with one tensor in memory.

{folder}/latest                       the name of the only iteration
{folder}/1/mp_rank_00_model_states.pt
"""

import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cogvideox_sat.files.atomic import new_folder
from cogvideox_sat.weights.checkpoint_files import NETWORK_PREFIX, checkpoint_file
from sgm.errors import UserError
from sgm.weights import module_weights, read_state_dict

ITERATION = "1"
FILE = "mp_rank_00_model_states.pt"
# Records of a `torch.save` file besides the bytes of tensors. Other records hold the exact positions of these bytes,
# which are different here.
RECORDS = ("data.pkl", "byteorder", "version")
# Zip archives: the header before a name, the header of an extra field, and the id of PyTorch's padding fields.
ENTRY_HEADER, EXTRA_HEADER, PADDING_ID = struct.Struct("<4s5H3L2H"), struct.Struct("<2H"), 0x4246
ALIGNMENT = 64  # bytes


def write_checkpoint(
    folder: Path, like: Mapping[str, Tensor], tensor: Callable[[str], Tensor], texts: Mapping[str, str] | None = None
) -> None:
    """Write the tensors of a network into a checkpoint folder, replacing an existing one.

    Args:
        like: for each of the network's names, a tensor of the shape and dtype to write; its values are not used.
        tensor: a function that returns a tensor by name; called once for each name, in order.
        texts: contents of further files in the folder, by name.

    Raises:
        UserError: the checkpoint cannot be written.
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
    """Write the file that `torch.save({key: ...})` writes, one tensor in memory at a time.

    `torch.save` itself describes the tensors without their bytes. The bytes follow, one tensor after the other, as
    records that have correct checksums and can be mapped.

    Args:
        like, tensor: see `write_checkpoint`.
        prefix: the beginning of all names in the file.

    Raises:
        OSError: the file cannot be written.
        ValueError: a tensor differs from `like`.
    """
    descriptions = described(path, {key: {prefix + name: _untouched(value) for name, value in like.items()}})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in descriptions.items():
            write_record(archive, name, content)
        for number, name in enumerate(tqdm(like, desc="writing", unit="tensor", leave=False)):
            value = tensor(name)
            if value.shape != like[name].shape or value.dtype != like[name].dtype:
                raise ValueError(f"{name} is {value.dtype} {list(value.shape)}, not as announced")
            write_record(archive, f"data/{number}", value.contiguous().view(-1).view(torch.uint8).numpy().data)


def described(path: Path, content: Any) -> dict[str, bytes]:
    """Return the small records, by name, of the file that `torch.save(content, path)` writes.

    A sparse file exists at `path` for a moment. Tensors are numbered, `data/0` and so on, in their order in `content`.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file, torch.serialization.skip_data():
        torch.save(content, file)
    with zipfile.ZipFile(path) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        return {name: archive.read(f"{folder}/{name}") for name in RECORDS}


def _untouched(like: Tensor) -> Tensor:
    """Return a tensor like `like` that takes no memory until someone reads or writes it."""
    return torch.empty(like.shape, dtype=like.dtype)


def write_record(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Append an entry with content at a multiple of `ALIGNMENT`, so that it can be mapped."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    entry.file_size = len(content)
    start = archive.start_dir + ENTRY_HEADER.size + len(entry.filename)
    padding = -(start + EXTRA_HEADER.size) % ALIGNMENT
    entry.extra = EXTRA_HEADER.pack(PADDING_ID, padding) + bytes(padding)
    with archive.open(entry, "w") as record:
        record.write(content)


def check_written(folder: Path, like: Mapping[str, Tensor]) -> None:
    """Check that the checkpoint in `folder` reads back as written, else raise UserError."""
    file = checkpoint_file(folder)
    written = module_weights(read_state_dict(file), what=str(file))
    expected = {NETWORK_PREFIX + name: (tensor.shape, tensor.dtype) for name, tensor in like.items()}
    same = {name: (tensor.shape, tensor.dtype) for name, tensor in written.items()} == expected
    if not same or not _checksums_agree(file):
        raise UserError(f"{file} does not read back as it was written and is removed; check the disk")


def _checksums_agree(file: Path) -> bool:
    """Return whether the archive's CRCs hold, by reading every record back."""
    with zipfile.ZipFile(file) as archive:
        try:
            for entry in tqdm(archive.infolist(), desc="reading back", unit="tensor", leave=False):
                with archive.open(entry) as record:
                    while record.read(2**24):
                        pass
        except zipfile.BadZipFile:
            return False
    return True
