"""Combine the two halves of a guided batch; limit strong guidance to the data's range.

Each class is called with the unconditional and the conditional estimate u and c of the clean samples, (batch, ...,
channel, height, width), and the guidance scale w, a number or (batch,). The result is an estimate of the same shape, in
which a sample depends on its own u, c and w alone. Configurations name these classes as `dyn_thresh_config` of a
guider, under `sgm.modules.diffusionmodules.sampling_utils`.
"""

from typing import TypeAlias

import torch
from torch import Tensor

from sgm.errors import UserError
from sgm.modules.diffusionmodules.util import append_dims

Scale: TypeAlias = float | Tensor


class NoDynamicThresholding:
    """Guidance alone: g = u + w·(c − u) (Ho and Salimans 2022)."""

    def __call__(self, uncond: Tensor, cond: Tensor, scale: Scale) -> Tensor:
        """Return the guided estimate."""
        scale = append_dims(scale, cond.ndim) if isinstance(scale, Tensor) else scale
        return uncond + scale * (cond - uncond)


class StaticThresholding(NoDynamicThresholding):
    """g clamped to ±`limit`, for models of pixels in [-1, 1].

    Saharia et al. 2022, Imagen, section 2.3, "static".

    Raises:
        UserError: `limit` is not positive.
    """

    def __init__(self, limit: float = 1.0):
        if not limit > 0:
            raise UserError(f"dyn_thresh_config: limit: got {limit}; expected a positive number")
        self.limit = limit

    def __call__(self, uncond: Tensor, cond: Tensor, scale: Scale) -> Tensor:
        """Return the guided estimate within [-limit, limit]."""
        return super().__call__(uncond, cond, scale).clamp(-self.limit, self.limit)


class DynamicThresholding(NoDynamicThresholding):
    """g with its own mean and the standard deviation of u, both over the whole sample.

    The result is rescaled as in Lin et al. 2023 ("Common diffusion noise schedules and sample steps are flawed",
    section 3.4), towards u instead of c.
    """

    def __call__(self, uncond: Tensor, cond: Tensor, scale: Scale) -> Tensor:
        """Return the rescaled estimate."""
        guided = super().__call__(uncond, cond, scale)
        return _with_spread_of(guided, uncond, tuple(range(1, guided.ndim)))


class DynamicThresholdingV1(NoDynamicThresholding):
    """g without outliers, for latents, whose channels have different means.

    m is the mean of each channel over time, height and width; s is the smallest magnitude of g − m that a share
    `quantile` of a sample's values does not exceed. The result is m + clamp(g − m, −s, s).

    Args:
        scale_factor: of the latents; accepted from configurations, without effect, since the limit scales with the
            latents.
        quantile: in (0, 1].

    Raises:
        UserError: `quantile` is out of range.
    """

    def __init__(self, scale_factor: float = 1.0, quantile: float = 0.9995):
        if not 0 < quantile <= 1:
            raise UserError(f"dyn_thresh_config: quantile: got {quantile}; expected a number above 0 and up to 1")
        self.scale_factor, self.quantile = scale_factor, quantile

    def __call__(self, uncond: Tensor, cond: Tensor, scale: Scale) -> Tensor:
        """Return the guided estimate without outliers."""
        guided = super().__call__(uncond, cond, scale)
        mean = guided.mean(_all_but_channels(guided), keepdim=True)
        deviation = guided - mean
        limit = append_dims(_quantile(deviation.abs().flatten(1), self.quantile), guided.ndim)
        return mean + deviation.clamp(-limit, limit)


class DynamicThresholdingV2(NoDynamicThresholding):
    """g with the standard deviation per channel that guidance of `mimic_scale` gives.

    The channels keep their own means.

    Args:
        mimic_scale: a scale at which the model gives good samples.
    """

    def __init__(self, mimic_scale: float = 4.0):
        self.mimic_scale = mimic_scale

    def __call__(self, uncond: Tensor, cond: Tensor, scale: Scale) -> Tensor:
        """Return the guided estimate with the spread of weaker guidance."""
        guided, mimic = (
            super(DynamicThresholdingV2, self).__call__(uncond, cond, w) for w in (scale, self.mimic_scale)
        )
        return _with_spread_of(guided, mimic, _all_but_channels(guided))


def _all_but_channels(x: Tensor) -> tuple[int, ...]:
    """Return the axes of time, height and width of (batch, ..., channel, height, width)."""
    channels = max(x.ndim - 3, 1)
    return tuple(axis for axis in range(1, x.ndim) if axis != channels)


def _with_spread_of(x: Tensor, other: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return `x` with its own mean and the standard deviation of `other`, both over `axes`.

    Constants stay constant.
    """
    mean = x.mean(axes, keepdim=True)
    std, wanted = (each.std(axes, correction=0, keepdim=True) for each in (x, other))
    return mean + (x - mean) * (wanted / std.clamp_min(torch.finfo(x.dtype).tiny))


def _quantile(x: Tensor, share: float) -> Tensor:
    """Return the smallest value of each row that at least `share` of the row does not exceed.

    (batch, n) → (batch,). `torch.quantile` refuses more than 16 million values, which long videos have.
    """
    rank = min(max(int(-(-share * x.shape[1] // 1)), 1), x.shape[1])
    return x.kthvalue(rank, dim=1).values
