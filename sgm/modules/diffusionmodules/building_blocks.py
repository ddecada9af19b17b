"""Layers, schedules and small functions for networks on images and clips.

`diffusionmodules.util` exports them too.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import checkpoint as recomputation

from sgm.errors import UserError

SiLU = nn.SiLU

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVERAGES = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class GroupNorm32(nn.GroupNorm):
    """Group normalization in float32, whatever the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized tensor, in the dtype of `x`."""
        return super().forward(x.float()).type(x.dtype)


def normalization(channels: int) -> nn.Module:
    """Return a group normalization of 32 groups, computed in float32."""
    return GroupNorm32(32, channels)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Return a convolution over 1, 2 or 3 dimensions.

    Raises:
        UserError: `dims` is another number.
    """
    return _over(_CONVOLUTIONS, dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Return average pooling over 1, 2 or 3 dimensions.

    Raises:
        UserError: `dims` is another number.
    """
    return _over(_AVERAGES, dims)(*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Module:
    """Return a linear layer."""
    return nn.Linear(*args, **kwargs)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of the module to zero, and return it.

    A residual branch that ends in such a module starts at zero.
    """
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


@torch.no_grad()
def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply all parameters of the module by `scale`, and return it."""
    for parameter in module.parameters():
        parameter.mul_(scale)
    return module


def checkpoint(func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[Any], flag: bool) -> Any:
    """Return func(*inputs); with `flag`, recompute it in the backward pass.

    `params` has no effect: the parameters that `func` uses get their gradients in any case.
    """
    return recomputation.checkpoint(func, *inputs, use_reentrant=False) if flag else func(*inputs)


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """Return a[t] (batch,) with trailing axes of length 1, to broadcast over `x_shape`."""
    return a[t].reshape(len(t), *[1] * (len(x_shape) - 1))


def make_beta_schedule(
    schedule: str, n_timestep: int, linear_start: float = 1e-4, linear_end: float = 2e-2
) -> np.ndarray:
    """Return the β of each timestep: float64 (n_timestep,).

    Args:
        schedule: "linear", the scaled linear schedule, in which sqrt(β) is linear between the square roots of the ends.

    Raises:
        UserError: the schedule is unknown.
    """
    if schedule != "linear":
        raise UserError(f"schedule: {schedule!r} is unknown; use 'linear'")
    return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=np.float64) ** 2


def _over(layers: dict[int, type[nn.Module]], dims: int) -> type[nn.Module]:
    if dims not in layers:
        raise UserError(f"dims: {dims!r} is not supported; use 1, 2 or 3")
    return layers[dims]
