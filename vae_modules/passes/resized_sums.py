"""Sums of two large tensors that are written halved or doubled, without gradients.

The sum itself is not written. Each is one operator that reads its tensors and writes its result once: on a GPU one
kernel (see `gpu_kernels`; several PyTorch operations if it does not work), on a CPU piece by piece in the cache.
Tensors are (batch, channel, time, height, width) in channels-last memory.
"""

import torch
from torch import Tensor

from vae_modules.passes.gpu_support import kernels_for
from vae_modules.passes.pieces_in_cache import blocks, empty_channels_last, one_each, rows_in_cache


def halved_sum(x: Tensor, other: Tensor | None, offset: Tensor | None, halve_time: bool, lead: bool) -> Tensor:
    """Return x + other + offset with pairs of frames averaged, for a convolution of stride 2.

    A row and a column of zeros follow the image.

    Args:
        other: like `x`; None: nothing.
        offset: (channel,); None: nothing.
        halve_time: average pairs of frames. False: every frame stays.
        lead: the first frame has no pair.

    Returns:
        (batch, channel, time, height + 1, width + 1).
    """
    return _halved_sum(x, other, offset, halve_time, lead)


def doubled_sum(x: Tensor, other: Tensor | None, offset: Tensor | None) -> Tensor:
    """Return x + other + offset, see `halved_sum`, with every pixel repeated to 2x2."""
    return _doubled_sum(x, other, offset)


@torch.library.custom_op("cogvideox_vae::halved_sum", mutates_args=())
def _halved_sum(x: Tensor, other: Tensor | None, offset: Tensor | None, halve_time: bool, lead: bool) -> Tensor:
    padded = _empty_halved(x, halve_time, lead)
    if kernels := kernels_for(x, padded, *([] if other is None else [other])):
        kernels.write_halved_sum(padded, x, other, offset, halve_time, lead)
        return padded
    padded[..., -1, :].zero_()
    padded[..., -1].zero_()
    inner, alone = padded[..., :-1, :-1], int(lead) if halve_time else x.shape[2]
    for out in range(inner.shape[2]):
        frame = out if out < alone else 2 * out - alone
        for rows in rows_in_cache(x):
            one, to = _summed(x, other, offset, frame, rows), inner[:, :, out, rows]
            if frame < alone:
                to.copy_(one)
            else:
                torch.lerp(one, _summed(x, other, offset, frame + 1, rows), 0.5, out=to)
    return padded


@torch.library.custom_op("cogvideox_vae::doubled_sum", mutates_args=())
def _doubled_sum(x: Tensor, other: Tensor | None, offset: Tensor | None) -> Tensor:
    doubled = _empty_doubled(x)
    if kernels := kernels_for(x, doubled, *([] if other is None else [other])):
        kernels.write_doubled_sum(doubled, x, other, offset)
        return doubled
    for frame in range(x.shape[2]):
        for rows in rows_in_cache(x):
            one = one_each(_summed(x, other, offset, frame, rows).unsqueeze(2))
            blocks(doubled[:, :, frame : frame + 1, 2 * rows.start : 2 * rows.stop], one).copy_(one)
    return doubled


def _summed(x: Tensor, other: Tensor | None, offset: Tensor | None, frame: int, rows: slice) -> Tensor:
    """Return the sum for some rows of a frame."""
    piece = x[:, :, frame, rows]
    if offset is not None:
        piece = piece + offset[:, None, None]
    return piece if other is None else piece + other[:, :, frame, rows]


@_halved_sum.register_fake
def _(x: Tensor, other: Tensor | None, offset: Tensor | None, halve_time: bool, lead: bool) -> Tensor:
    return _empty_halved(x, halve_time, lead)


@_doubled_sum.register_fake
def _(x: Tensor, other: Tensor | None, offset: Tensor | None) -> Tensor:
    return _empty_doubled(x)


def _empty_halved(x: Tensor, halve_time: bool, lead: bool) -> Tensor:
    batch, channels, time, height, width = x.shape
    frames = int(lead) + (time - int(lead)) // 2 if halve_time else time
    return empty_channels_last(x, (batch, channels, frames, height + 1, width + 1))


def _empty_doubled(x: Tensor) -> Tensor:
    batch, channels, time, height, width = x.shape
    return empty_channels_last(x, (batch, channels, time, 2 * height, 2 * width))
