"""Passes of normalization over a large tensor, each with its own backward pass.

The passes keep only their arguments for the backward pass. Tensors are (batch, channel, time, height, width) in
channels-last memory. Each pass is one operator that reads and writes its tensors once: on a GPU one kernel (see
`gpu_kernels`; several PyTorch operations if it does not work), on a CPU piece by piece in the cache.
"""

from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

KNOWN = "_channel_sums"  # the attribute of a tensor with known sums
CACHED = 2**18  # bytes of a piece that stay in a CPU's cache between operations, beside other tensors


def channel_sums(x: Tensor) -> Tensor:
    """Return the sums of `x` and of its square over space and time.

    Sums are float32 within a part of a frame and float64 beyond, so that a clip of any size is summed precisely. The
    sums that `add_in_place` has computed are reused.

    Returns:
        float64 (2, batch, channel).
    """
    known = getattr(x, KNOWN, None)
    return _ChannelSums.apply(x) if known is None else known


def add_in_place(x: Tensor, other: Tensor, offset: Tensor | None = None) -> Tensor:
    """Add `other` to `x`, without gradients, and return `x`, with its `channel_sums` known.

    Args:
        offset: (channel,), added as well.
    """
    setattr(x, KNOWN, _add_and_sum(x, other, offset))
    return x


def modulated_silu(x: Tensor, scale: Tensor, shift: Tensor, lead: bool) -> Tensor:
    """Return silu(x * scale + shift), with the maps resized to `x` by nearest neighbour.

    `x` (batch, channel, T, H, W); `scale` and `shift` (batch, channel, t, h, w), whose sizes divide those of `x`. With
    `lead` the first frame has maps of its own and does not count in T and t. Computed in float32, returned in the dtype
    of `x`.
    """
    if x.shape[2] == 0:
        return x + (scale.sum() + shift.sum()).to(x.dtype)  # empty, but connected to the statistics in the graph
    return _ModulatedSiLU.apply(x, scale, shift, lead)


def write_modulated_silu(
    out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, lead: bool, *before: Tensor, tail: Tensor | None = None
) -> None:
    """Write the result of `modulated_silu` into `out`, which may be `x` or a part of a tensor.

    Args:
        before: another scale and shift (batch, channel, 1, 1, 1), which apply to `x` first.
        tail: receives a copy of its number of last frames; only if `out` is not `x`.
    """
    if out is x:
        vars(x).pop(KNOWN, None)
        _overwrite_with_modulated_silu(x, scale, shift, lead, list(before))
    else:
        _write_modulated_silu(out, x, scale, shift, lead, list(before), tail)


# ---------------------------------------------------------------- operators


@torch.library.custom_op("cogvideox_vae::channel_sums", mutates_args=())
def _channel_sums(x: Tensor) -> Tensor:
    kernels = _gpu_kernels(x)
    return kernels.channel_sums(x) if kernels else _sums(x)


@torch.library.custom_op("cogvideox_vae::add_and_sum", mutates_args=("x",))
def _add_and_sum(x: Tensor, other: Tensor, offset: Tensor | None) -> Tensor:
    if kernels := _gpu_kernels(x, other):
        return kernels.add_and_sum(x, other, offset)
    total = x.new_zeros((2, *x.shape[:2]), dtype=torch.float64)
    for frames, rows in _cached(x, 1):
        piece = x[:, :, frames, rows]
        if offset is not None:
            piece.add_(offset[:, None, None, None])
        piece.add_(other[:, :, frames, rows])
        total += _sums_of_piece(piece)
    return total


@torch.library.custom_op("cogvideox_vae::modulated_silu", mutates_args=("out", "tail"))
def _write_modulated_silu(
    out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, lead: bool, before: list[Tensor], tail: Tensor | None
) -> None:
    _modulate(out, x, scale, shift, lead, before, tail)


@torch.library.custom_op("cogvideox_vae::modulated_silu_", mutates_args=("x",))
def _overwrite_with_modulated_silu(x: Tensor, scale: Tensor, shift: Tensor, lead: bool, before: list[Tensor]) -> None:
    _modulate(x, x, scale, shift, lead, before)


@_channel_sums.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((2, *x.shape[:2]), dtype=torch.float64)


@_add_and_sum.register_fake
def _(x: Tensor, other: Tensor, offset: Tensor | None) -> Tensor:
    return x.new_empty((2, *x.shape[:2]), dtype=torch.float64)


@_write_modulated_silu.register_fake
def _(
    out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, lead: bool, before: list[Tensor], tail: Tensor | None
) -> None:
    return None


@_overwrite_with_modulated_silu.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, lead: bool, before: list[Tensor]) -> None:
    return None


def _modulate(
    out: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    lead: bool,
    before: list[Tensor],
    tail: Tensor | None = None,
) -> None:
    if x.shape[2] == 0:
        return
    if kernels := _gpu_kernels(x, out, *([] if tail is None else [tail])):
        kernels.write_modulated_silu(out, x, scale, shift, lead, (before[0], before[1]) if before else None, tail)
        return
    if before:
        scale, shift = before[0] * scale, before[1] * scale + shift
    for frames, at in _pieces(x, scale, lead):
        a, b = _one_each(scale[:, :, at]), _one_each(shift[:, :, at])
        one = a.shape[4] == 1  # for all rows
        multiple = 1 if one else x.shape[3] // a.shape[4]
        for _, rows in _cached(x[:, :, frames], multiple):
            steps = slice(None) if one else slice(rows.start // multiple, rows.stop // multiple)
            factor, summand, piece = a[:, :, :, :, steps], b[:, :, :, :, steps], out[:, :, frames, rows]
            torch.addcmul(summand, _blocks(x[:, :, frames, rows], factor), factor, out=_blocks(piece, factor))
            F.silu(piece, inplace=True)
    if tail is not None:
        tail.copy_(out[:, :, -tail.shape[2] :])


def _gpu_kernels(*tensors: Tensor) -> ModuleType | None:
    """Return the kernels for these tensors, or None.

    Triton takes a while to import, and is not needed on a CPU.
    """
    if tensors[0].device.type != "cuda":
        return None
    from vae_modules import gpu_kernels

    return gpu_kernels if gpu_kernels.serve(*tensors) else None


def _sums(x: Tensor) -> Tensor:
    """Return `channel_sums`, computed by PyTorch."""
    if x.device.type == "cpu":
        total = x.new_zeros((2, *x.shape[:2]), dtype=torch.float64)
        for frames, rows in _cached(x, 1):
            total += _sums_of_piece(x[:, :, frames, rows])
        return total
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = x.sum((3, 4), dtype=wide), torch.linalg.vector_norm(x, dim=(3, 4), dtype=wide)  # without a wide copy
    return torch.stack([sums[0].double(), sums[1].double().square()]).sum(3)


def _sums_of_piece(piece: Tensor) -> Tensor:
    rows = piece.permute(0, 2, 3, 4, 1).to(torch.promote_types(piece.dtype, torch.float32))
    return torch.stack([rows.sum(3), rows.square().sum(3)]).double().sum((2, 3))


def _cached(x: Tensor, multiple: int) -> Iterator[tuple[slice, slice]]:
    """Yield frames and rows of pieces that stay in a CPU's cache; on a GPU the whole tensor.

    Pieces have whole multiples of `multiple` rows.
    """
    frames, height = x.shape[2], x.shape[3]
    if x.device.type != "cpu":
        yield slice(0, frames), slice(0, height)
        return
    row_bytes = max(multiple * x[:, :, :1, :1].nbytes, 1)
    count = max(min(-(-(height // multiple) * row_bytes // CACHED), height // multiple), 1)
    edges = [multiple * round(height // multiple * index / count) for index in range(count + 1)]
    for frame in range(frames):
        for top, bottom in pairwise(edges):
            yield slice(frame, frame + 1), slice(top, bottom)


# ---------------------------------------------------------------- functions with a backward pass


class _ChannelSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _channel_sums(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        of_sum, of_square = gradient.to(torch.promote_types(x.dtype, torch.float32))[..., None, None, None]
        return torch.addcmul(of_sum, x, 2 * of_square).to(x.dtype)


class _ModulatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, lead: bool) -> Tensor:
        ctx.save_for_backward(x, scale, shift)
        ctx.lead = lead
        out = torch.empty_like(x)
        _write_modulated_silu(out, x, scale, shift, lead, [], None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift = ctx.saved_tensors
        d_x, d_scale, d_shift = torch.empty_like(x), torch.zeros_like(scale), torch.zeros_like(shift)
        for frames, at in _pieces(x, scale, ctx.lead):
            a, b = _one_each(scale[:, :, at]), _one_each(shift[:, :, at])
            blocks = _blocks(x[:, :, frames], a)
            modulated = torch.addcmul(b, blocks, a)
            d_modulated = torch.ops.aten.silu_backward(_blocks(gradient[:, :, frames], a).to(a.dtype), modulated)
            torch.mul(d_modulated, a, out=_blocks(d_x[:, :, frames], a))
            d_shift[:, :, at] += d_modulated.sum((3, 5, 7))
            d_scale[:, :, at] += d_modulated.mul_(blocks).sum((3, 5, 7))
        return d_x, d_scale, d_shift, None


def _pieces(x: Tensor, maps: Tensor, lead: bool) -> Iterator[tuple[slice, slice]]:
    """Yield frames of `x` and the frames of their maps, as many as one operation supports.

    On a CPU this is a single frame, which stays in the cache between operations.
    """
    alone, frames, steps = int(lead and x.shape[2] > 1), x.shape[2], maps.shape[2]
    if x.device.type == "cpu":
        repeats = max((frames - alone) // max(steps - alone, 1), 1)
        for frame in range(frames):
            step = frame if frame < alone else alone + (frame - alone) // repeats
            yield slice(frame, frame + 1), slice(step, step + 1)
        return
    if alone:
        yield slice(0, 1), slice(0, 1)
    yield slice(alone, frames), slice(alone, steps)


def _blocks(full: Tensor, like: Tensor) -> Tensor:
    """Return b c (t k) (h p) (w q) as b c t k h p w q.

    t, h and w are those of `like` (b c t 1 h 1 w 1).
    """
    return full.unflatten(4, (like.shape[6], -1)).unflatten(3, (like.shape[4], -1)).unflatten(2, (like.shape[2], -1))


def _one_each(small: Tensor) -> Tensor:
    """Return b c t h w as b c t 1 h 1 w 1."""
    return small[:, :, :, None, :, None, :, None]
