"""The pass of normalization over a large tensor: a scale and a shift, then SiLU.

It has its own backward pass, for which it keeps only its arguments. It is one operator that reads and writes its
tensors once: on a GPU one kernel (see `gpu_kernels`; several PyTorch operations if it does not work), on a CPU piece by
piece in the cache. Tensors are (batch, channel, time, height, width) in channels-last memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vae_modules.passes.gpu_support import kernels_for
from vae_modules.passes.latent_maps import LatentMaps
from vae_modules.passes.pieces_in_cache import blocks, by_frame, one_each, rows_in_cache


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
    out: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    lead: bool,
    maps: LatentMaps | None = None,
    tail: Tensor | None = None,
) -> None:
    """Write the result of `modulated_silu` into `out`, which may be `x` or a part of a tensor.

    Args:
        x: like `out`, or with fewer frames, which are repeated as those of the maps are.
        maps: applied after `scale` and `shift`, and before SiLU; t of the maps is that of `scale`, or `scale` has 1.
        tail: receives a copy of its number of last frames; only if `out` is not `x`.
    """
    more = [] if maps is None else list(maps)
    if out is x:
        _overwrite_with_modulated_silu(x, scale, shift, lead, more)
    else:
        _write_modulated_silu(out, x, scale, shift, lead, more, tail)


# ---------------------------------------------------------------- operators


@torch.library.custom_op("cogvideox_vae::modulated_silu", mutates_args=("out", "tail"))
def _write_modulated_silu(
    out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, lead: bool, maps: list[Tensor], tail: Tensor | None
) -> None:
    _modulate(out, x, scale, shift, lead, maps, tail)


@torch.library.custom_op("cogvideox_vae::modulated_silu_", mutates_args=("x",))
def _overwrite_with_modulated_silu(x: Tensor, scale: Tensor, shift: Tensor, lead: bool, maps: list[Tensor]) -> None:
    _modulate(x, x, scale, shift, lead, maps)


@_write_modulated_silu.register_fake
def _(
    out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, lead: bool, maps: list[Tensor], tail: Tensor | None
) -> None:
    return None


@_overwrite_with_modulated_silu.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, lead: bool, maps: list[Tensor]) -> None:
    return None


def _modulate(
    out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, lead: bool, maps: list[Tensor], tail: Tensor | None = None
) -> None:
    if x.shape[2] == 0:
        return
    of_latent = LatentMaps(*maps) if maps else None
    if kernels := kernels_for(x, out, *([] if tail is None else [tail])):
        kernels.write_modulated_silu(out, x, scale, shift, lead, of_latent, tail)
        return
    if of_latent is not None:
        y, b = of_latent.scale_and_shift()
        scale, shift = scale * y, shift * y + b
    for frames, at, source in by_frame(out, lead, scale.shape[2], x.shape[2]):
        a, b = one_each(scale[:, :, at]), one_each(shift[:, :, at])
        one = a.shape[4] == 1  # for all rows
        multiple = 1 if one else x.shape[3] // a.shape[4]
        for rows in rows_in_cache(out, multiple):
            steps = slice(None) if one else slice(rows.start // multiple, rows.stop // multiple)
            factor, summand, piece = a[:, :, :, :, steps], b[:, :, :, :, steps], out[:, :, frames, rows]
            values = _repeated(x[:, :, source, rows], piece.shape[2])
            torch.addcmul(summand, blocks(values, factor), factor, out=blocks(piece, factor))
            F.silu(piece, inplace=True)
    if tail is not None:
        tail.copy_(out[:, :, -tail.shape[2] :])


def _repeated(x: Tensor, frames: int) -> Tensor:
    """Return `x` with each frame repeated, so that there are `frames`."""
    return x if x.shape[2] == frames else x.repeat_interleave(frames // x.shape[2], dim=2)


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
        for frames, at in by_frame(x, ctx.lead, scale.shape[2]):
            a, b = one_each(scale[:, :, at]), one_each(shift[:, :, at])
            parts = blocks(x[:, :, frames], a)
            modulated = torch.addcmul(b, parts, a)
            d_modulated = torch.ops.aten.silu_backward(blocks(gradient[:, :, frames], a).to(a.dtype), modulated)
            torch.mul(d_modulated, a, out=blocks(d_x[:, :, frames], a))
            d_shift[:, :, at] += d_modulated.sum((3, 5, 7))
            d_scale[:, :, at] += d_modulated.mul_(parts).sum((3, 5, 7))
        return d_x, d_scale, d_shift, None
