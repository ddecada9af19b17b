"""Normalization's two passes over a large tensor, each a function of its own for the backward pass.

Both keep nothing for it but what they are given, and recompute the rest. Tensors are (batch, channel, time, height,
width) in channels-last memory.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def channel_sums(x: Tensor) -> Tensor:
    """The sums over space and time of `x` and of its square, (2, batch, channel) in float64.

    Sums run along one row of a frame in float32 and from there on in float64, so a clip of any size is summed to
    full precision.
    """
    return _ChannelSums.apply(x)


def modulated_silu(x: Tensor, scale: Tensor, shift: Tensor, lead: bool) -> Tensor:
    """silu(x * scale + shift), the maps resized to `x` by nearest neighbour: in space, and in time past a first frame.

    `x` (batch, channel, T, H, W); `scale` and `shift` (batch, channel, t, h, w) where each size divides that of `x`,
    after the leading frame is taken off both if there is one. Computed in float32, returned in the type of `x`.
    """
    if x.shape[2] == 0:
        return x + (scale.sum() + shift.sum()).to(x.dtype)  # empty, but the graph goes on through the statistics
    return _ModulatedSiLU.apply(x, scale, shift, lead)


def write_modulated_silu(out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, lead: bool) -> None:
    """Write what `modulated_silu` returns into `out`, which may be a part of a larger tensor."""
    for frames, at in _pieces(x, scale, lead):
        a, b = _one_each(scale[:, :, at]), _one_each(shift[:, :, at])
        piece = out[:, :, frames]
        torch.addcmul(b, _blocks(x[:, :, frames], a), a, out=_blocks(piece, a))
        F.silu(piece, inplace=True)


class _ChannelSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = x.permute(0, 2, 3, 4, 1)  # b t h w c: contiguous in channels-last memory
        # Frame by frame, so that the squares take little memory. split() gives one empty piece of no frames.
        sums = [
            torch.stack([frame.sum(3, dtype=wide), frame.to(wide).square().sum(3)]).double().sum((2, 3))
            for frame in rows.split(1, dim=1)
        ]
        return torch.stack(sums).sum(0)

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
        write_modulated_silu(out, x, scale, shift, lead)
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
    """Frames of `x` and the frames of the maps that hold for them: as many as one operation can take.

    On a CPU a single frame, which stays in the cache from one operation to the next.
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
    """b c (t k) (h p) (w q) -> b c t k h p w q, with t, h and w as in `like` (b c t 1 h 1 w 1)."""
    return full.unflatten(4, (like.shape[6], -1)).unflatten(3, (like.shape[4], -1)).unflatten(2, (like.shape[2], -1))


def _one_each(small: Tensor) -> Tensor:
    """b c t h w -> b c t 1 h 1 w 1"""
    return small[:, :, :, None, :, None, :, None]
