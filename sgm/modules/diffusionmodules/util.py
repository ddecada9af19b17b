"""Small helpers that several parts of the diffusion code share."""

import math
from typing import Any

import torch
from torch import Tensor

from sgm.errors import UserError
from sgm.modules.diffusionmodules.building_blocks import (
    GroupNorm32,
    SiLU,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    extract_into_tensor,
    linear,
    make_beta_schedule,
    normalization,
    scale_module,
    zero_module,
)

__all__ = [
    "GroupNorm32",
    "SiLU",
    "append_dims",
    "avg_pool_nd",
    "checkpoint",
    "conv_nd",
    "extract_into_tensor",
    "linear",
    "make_beta_schedule",
    "mean_flat",
    "normalization",
    "reject_options",
    "scale_module",
    "timestep_embedding",
    "zero_module",
]


def append_dims(x: Tensor, ndim: int) -> Tensor:
    """Return `x` with trailing axes of length 1, up to `ndim` axes, for broadcasting."""
    return x[(...,) + (None,) * (ndim - x.ndim)]


def mean_flat(tensor: Tensor) -> Tensor:
    """Return the mean of each sample: (batch, ...) -> (batch,)."""
    return tensor.flatten(1).mean(1)


def timestep_embedding(
    timesteps: Tensor,
    dim: int,
    max_period: float = 10000,
    repeat_only: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the sinusoidal embedding of timesteps (Vaswani et al. 2017), cosines first.

    Args:
        timesteps: (batch,), integer or fractional; the embedding is computed in float32 for every dtype.
        dim: features; an odd `dim` ends in a zero.
        max_period: the longest period, in timesteps.
        repeat_only: repeat the timestep itself instead.

    Returns:
        (batch, dim) in `dtype`.
    """
    if repeat_only:
        return timesteps[:, None].to(dtype).expand(-1, dim).clone()
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    if dim % 2:
        embedding = torch.nn.functional.pad(embedding, (0, 1))
    return embedding.to(dtype)


def reject_options(owner: str, **options: Any) -> None:
    """Refuse unsupported options that configurations may set to a neutral value.

    Raises:
        UserError: one of `options` is neither None, zero nor false.
    """
    for name, value in options.items():
        if value:
            raise UserError(f"{owner} does not support {name}, which is set to {value}; remove it")
