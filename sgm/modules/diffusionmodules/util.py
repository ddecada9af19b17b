"""Small helpers that several parts of the diffusion code share."""

import math
from typing import Any

import torch
from torch import Tensor

from sgm.errors import UserError


def append_dims(x: Tensor, ndim: int) -> Tensor:
    """`x` with trailing axes of length 1, up to `ndim` axes, so that it broadcasts over the rest of a sample."""
    return x[(...,) + (None,) * (ndim - x.ndim)]


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000, dtype=torch.float32) -> Tensor:
    """Sinusoidal embedding of timesteps (Vaswani et al. 2017), cosines first.

    Args:
        timesteps: (batch,), integer or fractional; computed in float32 whatever its dtype.
        dim: features; an odd `dim` ends in a zero.
        max_period: the longest period, in timesteps.

    Returns:
        (batch, dim) in `dtype`.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    if dim % 2:
        embedding = torch.nn.functional.pad(embedding, (0, 1))
    return embedding.to(dtype)


def reject_options(owner: str, **options: Any) -> None:
    """Refuse options that configurations may carry at a neutral value but that are not supported.

    Raises:
        UserError: one of `options` is neither None, zero nor false.
    """
    for name, value in options.items():
        if value:
            raise UserError(f"{owner} does not support {name}, which is set to {value}; remove it")
