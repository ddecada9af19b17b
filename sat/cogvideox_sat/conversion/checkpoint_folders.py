"""Writing a checkpoint of the network as `load:` takes it, one tensor in memory at a time, complete or not at all.

{folder}/latest                       the name of the one iteration
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
# What a file of `torch.save` holds beside the bytes of tensors. It holds more: where exactly its own writer puts these
# bytes, which is not where they are here.
RECORDS = ("data.pkl", "byteorder", "version")
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
    """Write what `torch.save({key: ...})` writes, names prefixed, from tensors that need not exist at the same time.

    `torch.save` itself describes the tensors, leaving out their bytes. They follow, one tensor after another, as
    records whose checksums are right and which can be mapped.

    Args:
        like, tensor: see `write_checkpoint`.

    Raises:
        OSError: the file cannot be written.
        ValueError: a tensor is not as announced.
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
    """Return the small records, by their names, of the file that `torch.save(content, path)` would write.

    For a moment there is a file at `path`, with holes in the place of the tensors' bytes, which take no room on the
    disk. It numbers tensors, `data/0` and so on, in their order in `content`.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file, torch.serialization.skip_data():
        torch.save(content, file)
    with zipfile.ZipFile(path) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        return {name: archive.read(f"{folder}/{name}") for name in RECORDS}


def _untouched(like: Tensor) -> Tensor:
    """A tensor of the shape and dtype of `like` that takes no memory as long as nobody reads or writes it."""
    return torch.empty(like.shape, dtype=like.dtype)


def write_record(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Append an entry whose content starts at a multiple of `ALIGNMENT`, so that it can be mapped."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    entry.file_size = len(content)
    start = archive.start_dir + ENTRY_HEADER.size + len(entry.filename)
    padding = -(start + EXTRA_HEADER.size) % ALIGNMENT
    entry.extra = EXTRA_HEADER.pack(PADDING_ID, padding) + bytes(padding)
    with archive.open(entry, "w") as record:
        record.write(content)


def check_written(folder: Path, like: Mapping[str, Tensor]) -> None:
    """Raises UserError unless the checkpoint in `folder` reads back as it was written."""
    file = checkpoint_file(folder)
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
