"""Write safetensors files one tensor at a time, and compare what was written."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox_sat.conversion.stored_weights import StoredWeights
from sgm.errors import UserError

DTYPES = {  # the names of dtypes in safetensors' headers
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def split(weights: StoredWeights, shard_bytes: int) -> list[StoredWeights]:
    """Return the tensors in order, in groups of at most `shard_bytes` or of one larger tensor."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, like in weights.like.items():
        if groups[-1] and size + like.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += like.nbytes
    return [weights.select(group) for group in groups]


def stream_safetensors(path: Path, weights: StoredWeights, done: Callable[[], Any] = lambda: None) -> None:
    """Write the file that safetensors' `save_file` writes, one tensor in memory at a time.

    The file consists of the length of a JSON header, the header with dtypes, shapes and positions, and the bytes of the
    tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, like in weights.like.items():
        header[name] = {
            "dtype": DTYPES[like.dtype],
            "shape": list(like.shape),
            "data_offsets": [offset, offset + like.nbytes],
        }
        offset += like.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # so that mapped tensors are aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in weights:
            file.write(weights[name].contiguous().view(-1).view(torch.uint8).numpy().data)
            done()


def check_equal(
    written: StoredWeights, meant: StoredWeights, where: Path, done: Callable[[], Any] = lambda: None
) -> None:
    """Check that written tensors equal, bit by bit, the tensors that were meant to be written.

    Raises:
        UserError: they differ.
    """
    if written.shapes != meant.shapes:
        raise UserError(f"{where} does not read back as it was written, it holds other tensors; check the disk")
    for name in meant:
        if not equal_bits(written[name], meant[name]):
            raise UserError(f"{where} does not read back as it was written, {name} differs; check the disk")
        done()


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits, so that NaN equals NaN."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b)))
