"""Noise schedules: the noise levels of n steps of sampling or training.

There are two kinds. `EDMDiscretization` and `LegacyDDPMDiscretization` give noise-to-signal ratios σ;
`ZeroSNRDDPMDiscretization` gives a = sqrt(ᾱ), the share of signal in x = a·x0 + sqrt(1 − a²)·ε. Both are related by
σ = sqrt(1 − a²)/a; `to_alpha` converts the values of either kind to a.

Tables are NumPy arrays, so that samplers read them as Python numbers without waiting for a device.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from sgm.errors import UserError
from sgm.modules.diffusionmodules.building_blocks import make_beta_schedule


def equally_spaced_steps(num_steps: int, num_timesteps: int) -> np.ndarray:
    """Return `num_steps` of the timesteps 0 … num_timesteps − 1, ascending, with the last one.

    Raises:
        UserError: `num_steps` is below 1 or above `num_timesteps`.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise UserError(f"num_steps: got {num_steps}; this noise schedule takes 1 to {num_timesteps}")
    return np.linspace(num_timesteps - 1, 0, num_steps, endpoint=False).astype(np.int64)[::-1].copy()


def generate_roughly_equally_spaced_steps(num_substeps: int, max_step: int) -> np.ndarray:
    """Return `equally_spaced_steps`, under the name in the original."""
    return equally_spaced_steps(num_substeps, max_step)


def linear_alphas_cumprod(start: float, end: float, num_timesteps: int) -> np.ndarray:
    """Return ᾱ of the "scaled linear" β schedule: float64 (num_timesteps,).

    Args:
        start, end: the first and the last β.
    """
    return np.cumprod(1.0 - make_beta_schedule("linear", num_timesteps, start, end))


class Discretization(ABC):
    """A noise schedule that can be sampled at any number of steps."""

    gives_alpha = False

    @abstractmethod
    def table(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `n` noise levels from noisy to clean (float32), and ascending timesteps (int64)."""

    def __call__(
        self,
        n: int,
        do_append_zero: bool = True,
        device: torch.device | str = "cpu",
        flip: bool = False,
        return_idx: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the noise levels of `n` steps, from noisy to clean.

        Args:
            n: number of steps.
            do_append_zero: append a 0 after the cleanest level.
            device: device of the result.
            flip: reverse the order of the levels.
            return_idx: also return the timesteps, ascending: the first belongs to the cleanest level.

        Returns:
            float32 (n,) or (n + 1,); with `return_idx` also the timesteps, int64 (n,).
        """
        levels, timesteps = self.table(n)
        if do_append_zero:
            levels = np.append(levels, np.float32(0.0))
        if flip:
            levels = levels[::-1].copy()
        levels = torch.from_numpy(levels).to(device)
        return (levels, torch.from_numpy(timesteps).to(device)) if return_idx else levels

    def get_sigmas(
        self, n: int, device: torch.device | str = "cpu", return_idx: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the `n` noise levels from noisy to clean, without a zero.

        Args:
            return_idx: also return their timesteps.
        """
        return self(n, do_append_zero=False, device=device, return_idx=return_idx)

    def to_alpha(self, levels: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Return a = sqrt(ᾱ) of levels of this schedule."""
        return levels if self.gives_alpha else (1.0 + levels**2) ** -0.5


class EDMDiscretization(Discretization):
    """σ^(1/ρ) falls linearly from `sigma_max` to `sigma_min` (Karras et al. 2022, equation 5).

    The schedule is continuous; `num_timesteps` is the number of steps of its finest grid, which numbers the timesteps.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, num_timesteps: int = 1000):
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.rho = rho
        self.num_timesteps = num_timesteps

    def table(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        if n < 1:
            raise UserError(f"num_steps: got {n}; expected at least 1")
        ramp = np.linspace(0.0, 1.0, n)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigmas = (high + ramp * (low - high)) ** self.rho
        timesteps = np.rint((self.num_timesteps - 1) * (1.0 - ramp)).astype(np.int64)
        return sigmas.astype(np.float32), timesteps[::-1].copy()


class LegacyDDPMDiscretization(Discretization):
    """σ = sqrt((1 − ᾱ)/ᾱ) of the scaled linear DDPM schedule (Rombach et al. 2022)."""

    def __init__(self, linear_start: float = 0.00085, linear_end: float = 0.0120, num_timesteps: int = 1000):
        self.num_timesteps = num_timesteps
        self.alphas_cumprod = linear_alphas_cumprod(linear_start, linear_end, num_timesteps)

    def table(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        timesteps = equally_spaced_steps(n, self.num_timesteps)
        alphas_cumprod = self.alphas_cumprod[timesteps][::-1]
        return np.sqrt((1 - alphas_cumprod) / alphas_cumprod).astype(np.float32), timesteps


class ZeroSNRDDPMDiscretization(Discretization):
    """a = sqrt(ᾱ) of the scaled linear DDPM schedule, shifted in SNR, from a = 0.

    The stretch to a = 0 is that of Lin et al. 2023 ("Common diffusion noise schedules and sample steps are flawed",
    algorithm 1), applied to the n chosen steps. The shift divides the signal-to-noise ratio by `shift_scale`, since
    ᾱ/(k + (1−k)·ᾱ) has the SNR ᾱ/(1−ᾱ)/k.

    Args:
        shift_scale: k; 1: no shift, larger: noisier.
        keep_start: shift the first β as well, which keeps the clean end of the schedule.
        post_shift: shift after the stretch instead of before.
    """

    gives_alpha = True

    def __init__(
        self,
        linear_start: float = 0.00085,
        linear_end: float = 0.0120,
        num_timesteps: int = 1000,
        shift_scale: float = 1.0,
        keep_start: bool = False,
        post_shift: bool = False,
    ):
        if keep_start:
            linear_start = linear_start / (shift_scale + (1 - shift_scale) * linear_start)
        self.num_timesteps = num_timesteps
        self.shift_scale = shift_scale
        self.post_shift = post_shift
        alphas_cumprod = linear_alphas_cumprod(linear_start, linear_end, num_timesteps)
        self.alphas_cumprod = alphas_cumprod if post_shift else self._shift(alphas_cumprod)

    def _shift(self, alphas_cumprod: np.ndarray) -> np.ndarray:
        return alphas_cumprod / (self.shift_scale + (1 - self.shift_scale) * alphas_cumprod)

    def table(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        timesteps = equally_spaced_steps(n, self.num_timesteps)
        a = np.sqrt(self.alphas_cumprod[timesteps].astype(np.float32))
        first, last = a[0], a[-1]
        # A single step starts from pure noise; one value cannot be stretched to two ends.
        a = (a - last) * (first / (first - last)) if n > 1 else np.zeros_like(a)
        if self.post_shift:
            a = np.sqrt(self._shift(a**2))
        return a[::-1].copy(), timesteps
