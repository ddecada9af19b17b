"""Sums of a large tensor's channels, and additions that take them in the same pass.

Each pass is one operator that reads and writes its tensors once: on a GPU one kernel (see `gpu_kernels`; several
PyTorch operations if it does not work), on a CPU piece by piece in the cache. Tensors are (batch, channel, time,
height, width) in channels-last memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vae_modules.passes.gpu_support import kernels_for
from vae_modules.passes.pieces_in_cache import by_frame, rows_in_cache


def channel_sums(x: Tensor) -> Tensor:
    """Return the sums of `x` and of its square over space and time.

    Sums are float32 within a part of a frame and float64 beyond, so that a clip of any size is summed precisely.

    Returns:
        float64 (2, batch, channel).
    """
    return _ChannelSums.apply(x)


def add_in_place(x: Tensor, other: Tensor, offset: Tensor | None = None, lead: bool = False) -> Tensor:
    """Add `other` to `x`, without gradients, and return the `channel_sums` of the result.

    Args:
        other: like `x`, or with fewer frames, which are repeated (see `frame_of`).
        offset: (channel,), added as well.
        lead: the first frame of `other` stands for one frame only.
    """
    return _add_and_sum(x, other, offset, lead)


# ---------------------------------------------------------------- operators


@torch.library.custom_op("cogvideox_vae::channel_sums", mutates_args=())
def _channel_sums(x: Tensor) -> Tensor:
    if kernels := kernels_for(x):
        return kernels.channel_sums(x)
    if x.device.type == "cpu":
        total = x.new_zeros((2, *x.shape[:2]), dtype=torch.float64)
        for (frames,) in by_frame(x, False):
            for rows in rows_in_cache(x):
                total += _sums_of_piece(x[:, :, frames, rows])
        return total
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = x.sum((3, 4), dtype=wide), torch.linalg.vector_norm(x, dim=(3, 4), dtype=wide)  # without a wide copy
    return torch.stack([sums[0].double(), sums[1].double().square()]).sum(3)


@torch.library.custom_op("cogvideox_vae::add_and_sum", mutates_args=("x",))
def _add_and_sum(x: Tensor, other: Tensor, offset: Tensor | None, lead: bool) -> Tensor:
    if kernels := kernels_for(x, other):
        return kernels.add_and_sum(x, other, offset, lead)
    total = x.new_zeros((2, *x.shape[:2]), dtype=torch.float64)
    for frames, others in by_frame(x, lead, other.shape[2]):
        for rows in rows_in_cache(x):
            piece, more = x[:, :, frames, rows], other[:, :, others, rows]
            if offset is not None:
                piece.add_(offset[:, None, None, None])
            piece.unflatten(2, (more.shape[2], -1)).add_(more.unsqueeze(3))
            total += _sums_of_piece(piece)
    return total


@_channel_sums.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((2, *x.shape[:2]), dtype=torch.float64)


@_add_and_sum.register_fake
def _(x: Tensor, other: Tensor, offset: Tensor | None, lead: bool) -> Tensor:
    return x.new_empty((2, *x.shape[:2]), dtype=torch.float64)


def _sums_of_piece(piece: Tensor) -> Tensor:
    rows = piece.permute(0, 2, 3, 4, 1).to(torch.promote_types(piece.dtype, torch.float32))
    return torch.stack([rows.sum(3), rows.square().sum(3)]).double().sum((2, 3))


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
