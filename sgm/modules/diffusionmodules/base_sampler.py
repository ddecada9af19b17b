"""The base class of samplers that are written for the original and have their own loop."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sgm.modules.diffusionmodules.guiders import Cond, IdentityGuider
from sgm.modules.diffusionmodules.sampling_bar import SamplingBar
from sgm.modules.diffusionmodules.sampling_utils import check_schedule_of_sigma, steps_of_call
from sgm.util import instantiate_from_config


class BaseDiffusionSampler(SamplingBar):
    """Base class of a user's sampler with a loop of its own.

    `__call__(denoiser, x, cond, uc=None, num_steps=None)` is the user's. The class is for x = x0 + σ·ε, with a schedule
    of σ. The samplers of `sampling` do not derive from it.

    Args:
        discretization_config: the noise schedule.
        num_steps: number of steps, unless a call gives it.
        guider_config: guidance; none by default.
        verbose: show a progress bar (on the first process only).
        device: device of the noise levels; None: that of `x`.
    """

    def __init__(
        self,
        discretization_config: Mapping[str, Any],
        num_steps: int | None = None,
        guider_config: Mapping[str, Any] | None = None,
        verbose: bool = False,
        device: torch.device | str | None = None,
    ):
        self.num_steps = num_steps
        self.discretization = instantiate_from_config(discretization_config)
        self.guider = instantiate_from_config(guider_config) if guider_config else IdentityGuider()
        self.show_bar(verbose)
        self.device = device

    def prepare_sampling_loop(
        self, x: Tensor, cond: Cond, uc: Cond | None = None, num_steps: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, int, Cond, Cond]:
        """Return the values that a loop starts from.

        Args:
            x: (batch, ...) standard normal noise.

        Returns:
            The noise at the first level; ones (batch,); the noise levels σ from noisy to clean with a 0 at the end,
            float32 (num_steps + 1,); the number of these levels; the conditioning; the unconditional conditioning, by
            default `cond`.

        Raises:
            UserError: the number of steps is not given, or the schedule is not one of σ.
        """
        num_steps = steps_of_call(num_steps, self.num_steps)
        check_schedule_of_sigma(self, self.discretization)
        sigmas = self.discretization(num_steps, device=x.device if self.device is None else self.device)
        start = x * (1.0 + sigmas[0].to(x.device) ** 2) ** 0.5
        return start, x.new_ones(len(x)), sigmas, len(sigmas), cond, cond if uc is None else uc

    def denoise(self, x: Tensor, denoiser: Callable[..., Tensor], sigma: Tensor, cond: Cond, uc: Cond | None) -> Tensor:
        """Return the guided estimate of the clean samples at the levels `sigma` (batch,)."""
        return self.guider(denoiser(*self.guider.prepare_inputs(x, sigma, cond, uc)), sigma)

    def get_sigma_gen(self, num_sigmas: int) -> Iterable[int]:
        """Return the indices of the steps, with a progress bar if `verbose` is true."""
        return self.counted(range(num_sigmas - 1))
