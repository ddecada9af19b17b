"""Denoisers: estimates of the clean sample from a noisy one and its noise level."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sgm.errors import UserError
from sgm.modules.diffusionmodules.util import append_dims
from sgm.util import instantiate_from_config


class Denoiser(nn.Module):
    """D(x; level) = c_skip·x + c_out·network(c_in·x, c_noise, cond).

    Karras et al. 2022, equation 7.

    Args:
        weighting_config: the loss weight of a noise level, see `denoiser_weighting`.
        scaling_config: the four scales, see `denoiser_scaling`.
    """

    def __init__(self, weighting_config: Mapping[str, Any], scaling_config: Mapping[str, Any]):
        super().__init__()
        self.weighting = instantiate_from_config(weighting_config)
        self.scaling = instantiate_from_config(scaling_config)

    def w(self, sigma: Tensor) -> Tensor:
        """Return the loss weight of each noise level: (batch,) → (batch,)."""
        return self.weighting(sigma)

    def forward(
        self, network: Callable[..., Tensor], input: Tensor, sigma: Tensor, cond: dict[str, Tensor], **model_inputs: Any
    ) -> Tensor:
        """Return the estimate of the clean samples, shaped like `input`.

        Args:
            network: called as `network(x, c_noise, cond, **model_inputs)`, returns a tensor like `x`.
            input: (batch, ...) noisy samples.
            sigma: (batch,) noise levels: σ, or a = sqrt(ᾱ) for a scaling that takes a (`VideoScaling`).
            cond: conditioning by kind ("crossattn", "vector", "concat").
            model_inputs: passed to the scaling and the network; `VideoScaling` needs `idx`, the (batch,) timesteps.
        """
        level, index = self.quantize(sigma)
        c_skip, c_out, c_in, c_noise = self.scaling(level, **model_inputs)
        if index is not None:
            c_noise = index
        c_skip, c_out, c_in = (append_dims(c, input.ndim) for c in (c_skip, c_out, c_in))
        return network(input * c_in, c_noise, cond, **model_inputs) * c_out + input * c_skip

    def quantize(self, level: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the level to denoise at, and the network's noise input or None.

        None stands for the scaling's c_noise.
        """
        return level, None


class DiscreteDenoiser(Denoiser):
    """A denoiser for a network with `num_idx` noise levels: levels snap to the nearest one.

    Args:
        num_idx: number of levels in the table; index 0 is the cleanest, unless `flip` is off.
        discretization_config: the noise schedule of the table.
        do_append_zero, flip: as in `Discretization.__call__`.
        quantize_c_noise: pass the index of the level to the network instead of the scaling's c_noise. The option has no
            effect with a scaling that passes timesteps (`VideoScaling`).

    Raises:
        UserError: the schedule gives a = sqrt(ᾱ) and the scaling takes σ.
    """

    def __init__(
        self,
        weighting_config: Mapping[str, Any],
        scaling_config: Mapping[str, Any],
        num_idx: int,
        discretization_config: Mapping[str, Any],
        do_append_zero: bool = False,
        quantize_c_noise: bool = True,
        flip: bool = True,
    ):
        super().__init__(weighting_config, scaling_config)
        discretization = instantiate_from_config(discretization_config)
        levels = discretization(num_idx, do_append_zero=do_append_zero, flip=flip)
        if self.scaling.takes_alpha:
            levels = discretization.to_alpha(levels)
        elif discretization.gives_alpha:
            raise UserError(
                f"denoiser_config: {type(self.scaling).__name__} needs a schedule of sigma, which "
                f"{type(discretization).__name__} is not; use VideoScaling, or LegacyDDPMDiscretization"
            )
        # Not a buffer: `.half()` of the whole engine must not round the noise levels.
        self.levels = levels
        self.quantize_c_noise = quantize_c_noise and not self.scaling.takes_alpha

    def quantize(self, level: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.levels.device != level.device:
            self.levels = self.levels.to(level.device)
        index = self.level_to_idx(level)
        return self.idx_to_level(index), index if self.quantize_c_noise else None

    def level_to_idx(self, level: Tensor) -> Tensor:
        """Return the index of the nearest level of the table: (batch,) → int64 (batch,)."""
        return (level[:, None] - self.levels).abs().argmin(dim=1)

    def idx_to_level(self, idx: Tensor) -> Tensor:
        """Return the levels of indices of the table: int64 (batch,) → float32 (batch,)."""
        return torch.index_select(self.levels, 0, idx)

    def sigma_to_idx(self, sigma: Tensor) -> Tensor:
        """Return `level_to_idx`, under the name in the original."""
        return self.level_to_idx(sigma)

    def idx_to_sigma(self, idx: Tensor) -> Tensor:
        """Return `idx_to_level`, under the name in the original."""
        return self.idx_to_level(idx)
