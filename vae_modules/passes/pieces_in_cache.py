"""Divide a large tensor for passes over it.

Pieces stay in a CPU's cache, or have frames that one operation supports. Tensors are (batch, channel, time, height,
width) in channels-last memory. A tensor may stand for more frames than it has: see `frame_of`.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

CACHED = 2**18  # bytes of a piece that stay in a CPU's cache between operations, beside other tensors


def frame_of(frame: int, frames: int, stored: int, lead: bool) -> int:
    """Return which of `stored` frames stands for number `frame` of `frames`.

    This is nearest neighbour resizing. With `lead` the first frame is one by itself, and does not count in either
    number. A single stored frame stands for all.
    """
    if stored == 1:
        return 0
    alone = int(lead and frames > 1)
    return frame if frame < alone else alone + (frame - alone) * (stored - alone) // (frames - alone)


def rows_in_cache(x: Tensor, multiple: int = 1) -> Iterator[slice]:
    """Yield rows of `x` of which one frame stays in a CPU's cache; on a GPU all rows.

    Pieces have whole multiples of `multiple` rows.
    """
    height = x.shape[3]
    if x.device.type != "cpu":
        yield slice(0, height)
        return
    row_bytes = max(multiple * x[:, :, :1, :1].nbytes, 1)
    count = max(min(-(-(height // multiple) * row_bytes // CACHED), height // multiple), 1)
    edges = [multiple * round(height // multiple * index / count) for index in range(count + 1)]
    for top, bottom in pairwise(edges):
        yield slice(top, bottom)


def by_frame(x: Tensor, lead: bool, *stored: int) -> Iterator[tuple[slice, ...]]:
    """Yield frames of `x` with the frames that stand for them in smaller tensors.

    Those have `stored` frames; see `frame_of`. On a CPU this is a single frame, which stays in the cache between
    operations; otherwise as many as one operation supports.
    """
    frames = x.shape[2]
    if x.device.type == "cpu":
        for frame in range(frames):
            at = (frame_of(frame, frames, each, lead) for each in stored)
            yield slice(frame, frame + 1), *(slice(each, each + 1) for each in at)
        return
    alone = int(lead and frames > 1)
    for part in (slice(0, alone), slice(alone, frames)):
        if part.start < part.stop:
            yield part, *(part if each > 1 and part.stop == alone else _rest(each, alone) for each in stored)


def _rest(stored: int, alone: int) -> slice:
    return slice(alone if stored > 1 else 0, stored)


def empty_channels_last(like: Any, shape: Sequence[int]) -> Tensor:
    """Return a tensor of `shape` without content, in channels-last memory.

    Its dtype and device are those of `like`, a tensor or a `Product`.
    """
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


def blocks(full: Tensor, like: Tensor) -> Tensor:
    """Return b c (t k) (h p) (w q) as b c t k h p w q.

    t, h and w are those of `like` (b c t 1 h 1 w 1).
    """
    return full.unflatten(4, (like.shape[6], -1)).unflatten(3, (like.shape[4], -1)).unflatten(2, (like.shape[2], -1))


def one_each(small: Tensor) -> Tensor:
    """Return b c t h w as b c t 1 h 1 w 1."""
    return small[:, :, :, None, :, None, :, None]
