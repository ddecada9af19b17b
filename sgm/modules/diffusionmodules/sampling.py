"""The samplers: from noise to a clean sample, step by step along a noise schedule.

Samples are x = a·x0 + s·ε. Video samplers preserve the variance, with a = sqrt(ᾱ) and s = sqrt(1 − a²); classic
samplers let it grow, with a = 1 and s = σ. In the formulas x is the sample, D the estimate of the clean sample at its
level, and a prime marks the next level. All numbers of a step are Python floats from the schedule's table, so that
loops never wait for a device.

A sampler is a loop over the steps, `sample`; what happens around the loop is in `sampler`.
"""

import math
from abc import abstractmethod
from typing import Any

from torch import Tensor

from sgm.errors import UserError, shown
from sgm.modules.diffusionmodules.base_sampler import BaseDiffusionSampler
from sgm.modules.diffusionmodules.sampler import Run, Sampler
from sgm.modules.diffusionmodules.sampling_utils import (
    ancestral_step,
    check_schedule_of_sigma,
    half_log_snr,
    linear_multistep_coefficients,
    to_d,
)

__all__ = [
    "AncestralSampler",
    "BaseDiffusionSampler",
    "DDIMSampler",
    "DPMPP2MSampler",
    "DPMPP2SAncestralSampler",
    "EulerAncestralSampler",
    "EulerEDMSampler",
    "HeunEDMSampler",
    "LinearMultistepSampler",
    "Run",
    "SDEDPMPP2MSampler",
    "Sampler",
    "SigmaSampler",
    "VPODEDPMPP2MSampler",
    "VPSDEDPMPP2MSampler",
    "VideoDDIMSampler",
    "VideoDDPMSampler",
    "VideoSampler",
]


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm that both families share.
# ---------------------------------------------------------------------------------------------------------------------


def dpmpp_2m(x: Tensor, run: Run, stochastic: bool) -> Tensor:
    """Sample by DPM-Solver++(2M), or by its SDE form if `stochastic` is true.

    Lu et al. 2022, DPM-Solver++, algorithm 2. With λ = log(a/s), h = λ' − λ, D̂ = (1 + 1/2r)·D − (1/2r)·D_prev and
    r = h_prev/h:

        x' = (s'/s)·x − expm1(−h)·a'·D̂, or
        x' = (s'/s)·e^(−h)·x − expm1(−2h)·a'·D̂ + s'·sqrt(1 − e^(−2h))·ε.
    """
    previous: tuple[float, Tensor] | None = None  # h and D of the step before
    for i in run.steps:
        a, s, a_next, s_next = run.a[i], run.s[i], run.a[i + 1], run.s[i + 1]
        denoised = run.denoise(x, i)
        if s_next == 0:
            x = denoised
            continue

        h = half_log_snr(a_next, s_next) - half_log_snr(a, s)
        if previous is None:
            estimate = denoised
        else:
            h_prev, denoised_prev = previous
            half_inverse_r = h / (2 * h_prev)
            estimate = (1 + half_inverse_r) * denoised - half_inverse_r * denoised_prev

        if stochastic:
            eps = run.noise(x)
            if previous is not None:
                # The first draw is unused, so that a seed keeps giving the same video.
                eps = run.noise(x)
            x = s_next / s * math.exp(-h) * x - math.expm1(-2 * h) * a_next * estimate
            x = x + s_next * math.sqrt(-math.expm1(-2 * h)) * eps
        else:
            x = s_next / s * x - math.expm1(-h) * a_next * estimate
        previous = h, denoised
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Video samplers: the variance is preserved.
# ---------------------------------------------------------------------------------------------------------------------


class VideoSampler(Sampler):
    """Base class of the video samplers: the schedule of a, which ends at 1.

    Args:
        fixed_frames: number of clean frames at the start of the noise that a call gets; they stay as they are while the
            other frames are denoised. A call's `start` replaces them.
        sdedit: bring such frames to the noise level of each step, with fresh noise, rather than keep them clean.
        kwargs: see `Sampler`.

    Raises:
        UserError: `fixed_frames` is not a number of frames.
    """

    variance_preserving = True

    def __init__(self, *args: Any, fixed_frames: int = 0, sdedit: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if type(fixed_frames) is not int or fixed_frames < 0:
            raise UserError(
                f"sampler_config: fixed_frames: got {shown(fixed_frames)}; expected a whole number of latent frames"
            )
        self.fixed_frames = fixed_frames
        self.sdedit = sdedit

    def schedule(self, num_steps: int) -> tuple[list[float], list[float], list[int]]:
        levels, timesteps = self.discretization.table(num_steps)
        a = [*self.discretization.to_alpha(levels.astype(float)).tolist(), 1.0]
        return a, [math.sqrt(1 - a_i * a_i) for a_i in a], timesteps[::-1].tolist()


class VideoDDIMSampler(VideoSampler):
    """The deterministic first-order step (Song et al. 2021, DDIM, equation 12 with σ = 0)."""

    def sample(self, x: Tensor, run: Run) -> Tensor:
        for i in run.steps:
            a, s, a_next, s_next = run.a[i], run.s[i], run.a[i + 1], run.s[i + 1]
            denoised = run.denoise(x, i)
            x = s_next / s * x + (a_next - a * s_next / s) * denoised
        return x


class VideoDDPMSampler(VideoSampler):
    """The stochastic first-order step: a draw from q(x' | x, x0 = D).

    Ho et al. 2020, DDPM, equations 6 and 7. With α = (a/a')²: x' = (a/a')·(s'/s)²·x + a'·(1 − α)/s²·D + s'·sqrt(1 −
    α)/s·ε.
    """

    def sample(self, x: Tensor, run: Run) -> Tensor:
        for i in run.steps:
            a, s, a_next, s_next = run.a[i], run.s[i], run.a[i + 1], run.s[i + 1]
            denoised = run.denoise(x, i)
            if s_next == 0:
                x = denoised
                continue
            ratio = a / a_next
            lost = 1 - ratio**2
            x = ratio * (s_next / s) ** 2 * x + a_next * lost / s**2 * denoised
            x = x + s_next / s * math.sqrt(lost) * run.noise(x)
        return x


class VPODEDPMPP2MSampler(VideoSampler):
    """DPM-Solver++(2M)."""

    def sample(self, x: Tensor, run: Run) -> Tensor:
        return dpmpp_2m(x, run, stochastic=False)


class VPSDEDPMPP2MSampler(VideoSampler):
    """SDE-DPM-Solver++(2M), the sampler of the released models."""

    def sample(self, x: Tensor, run: Run) -> Tensor:
        return dpmpp_2m(x, run, stochastic=True)


# ---------------------------------------------------------------------------------------------------------------------
# Classic samplers: x = x0 + σ·ε.
# ---------------------------------------------------------------------------------------------------------------------


class SigmaSampler(Sampler):
    """Base class of the classic samplers: the schedule of σ, which ends at 0."""

    variance_preserving = False

    def schedule(self, num_steps: int) -> tuple[list[float], list[float], list[int]]:
        check_schedule_of_sigma(self, self.discretization)
        sigmas, timesteps = self.discretization.table(num_steps)
        return [1.0] * (num_steps + 1), [*sigmas.tolist(), 0.0], timesteps[::-1].tolist()

    def noised(self, noise: Tensor, clip: Tensor | None, a: float, s: float) -> Tensor:
        # Without a clip, the clean sample is assumed to have unit variance.
        return noise * math.sqrt(1 + s**2) if clip is None else super().noised(noise, clip, a, s)


class DDIMSampler(SigmaSampler):
    """The first-order step with fresh noise: x' = x + (σ'·sqrt(1 − k²) − σ)·d + k·σ'·ε.

    Args:
        s_noise: k, the share of the next level's noise that is drawn afresh; 0 gives Euler's method.

    Raises:
        UserError: `s_noise` is not between 0 and 1.
    """

    def __init__(self, *args: Any, s_noise: float = 0.1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not 0 <= s_noise <= 1:
            raise UserError(f"sampler_config: s_noise: got {s_noise}; expected a number from 0 to 1")
        self.s_noise = s_noise

    def sample(self, x: Tensor, run: Run) -> Tensor:
        for i in run.steps:
            sigma, sigma_next = run.s[i], run.s[i + 1]
            d = to_d(x, sigma, run.denoise(x, i))
            x = x + (sigma_next * math.sqrt(1 - self.s_noise**2) - sigma) * d
            if self.s_noise and sigma_next:
                x = x + self.s_noise * sigma_next * run.noise(x)
        return x


class DPMPP2MSampler(SigmaSampler):
    """DPM-Solver++(2M)."""

    def sample(self, x: Tensor, run: Run) -> Tensor:
        return dpmpp_2m(x, run, stochastic=False)


class SDEDPMPP2MSampler(SigmaSampler):
    """SDE-DPM-Solver++(2M)."""

    def sample(self, x: Tensor, run: Run) -> Tensor:
        return dpmpp_2m(x, run, stochastic=True)


class EulerEDMSampler(SigmaSampler):
    """Euler's method with optional churn (Karras et al. 2022, algorithm 2, first order).

    Args:
        s_churn, s_tmin, s_tmax, s_noise: amount of noise added before a step, the range of σ in which it is added, and
            its scale.
    """

    def __init__(
        self,
        *args: Any,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.s_churn = s_churn
        self.s_tmin = s_tmin
        self.s_tmax = s_tmax
        self.s_noise = s_noise

    def sample(self, x: Tensor, run: Run) -> Tensor:
        for i in run.steps:
            sigma, sigma_next = run.s[i], run.s[i + 1]
            churned = self.s_tmin <= sigma <= self.s_tmax
            gamma = min(self.s_churn / run.num_steps, math.sqrt(2) - 1) if churned else 0.0
            sigma_hat = sigma * (1 + gamma)
            if gamma > 0:
                x = x + run.noise(x) * self.s_noise * math.sqrt(sigma_hat**2 - sigma**2)
            d = to_d(x, sigma_hat, run.denoise(x, i, sigma_hat))
            x_euler = x + (sigma_next - sigma_hat) * d
            x = self.correct(x, x_euler, d, sigma_hat, sigma_next, i, run)
        return x

    def correct(
        self, x: Tensor, x_euler: Tensor, d: Tensor, sigma: float, sigma_next: float, step: int, run: Run
    ) -> Tensor:
        """Return a correction of `x_euler`, for methods of a higher order."""
        return x_euler


class HeunEDMSampler(EulerEDMSampler):
    """Heun's second-order method with optional churn (Karras et al. 2022, algorithm 2)."""

    def correct(
        self, x: Tensor, x_euler: Tensor, d: Tensor, sigma: float, sigma_next: float, step: int, run: Run
    ) -> Tensor:
        if sigma_next == 0:
            return x_euler
        d_next = to_d(x_euler, sigma_next, run.denoise(x_euler, step, sigma_next))
        return x + (sigma_next - sigma) * (d + d_next) / 2


class AncestralSampler(SigmaSampler):
    """Base class of samplers that step below the next level and add noise.

    Args:
        eta: share of the noise that is added; 0 makes the sampler deterministic.
        s_noise: scale of that noise.
    """

    def __init__(self, *args: Any, eta: float = 1.0, s_noise: float = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.eta = eta
        self.s_noise = s_noise

    def sample(self, x: Tensor, run: Run) -> Tensor:
        for i in run.steps:
            sigma, sigma_next = run.s[i], run.s[i + 1]
            sigma_down, sigma_up = ancestral_step(sigma, sigma_next, self.eta)
            x = self.step_down(x, run.denoise(x, i), sigma, sigma_down, i, run)
            x = x + run.noise(x) * self.s_noise * sigma_up
        return x

    @abstractmethod
    def step_down(self, x: Tensor, denoised: Tensor, sigma: float, sigma_down: float, step: int, run: Run) -> Tensor:
        """Return the sample after the deterministic part of a step."""


class EulerAncestralSampler(AncestralSampler):
    """Euler's method with ancestral noise (k-diffusion's `sample_euler_ancestral`)."""

    def step_down(self, x: Tensor, denoised: Tensor, sigma: float, sigma_down: float, step: int, run: Run) -> Tensor:
        return x + (sigma_down - sigma) * to_d(x, sigma, denoised)


class DPMPP2SAncestralSampler(AncestralSampler):
    """DPM-Solver++(2S) with ancestral noise (Lu et al. 2022, algorithm 1, r = 1/2)."""

    def step_down(self, x: Tensor, denoised: Tensor, sigma: float, sigma_down: float, step: int, run: Run) -> Tensor:
        if sigma_down == 0:
            return denoised
        h = math.log(sigma / sigma_down)
        sigma_mid = math.sqrt(sigma * sigma_down)
        x_mid = sigma_mid / sigma * x - math.expm1(-h / 2) * denoised
        return sigma_down / sigma * x - math.expm1(-h) * run.denoise(x_mid, step, sigma_mid)


class LinearMultistepSampler(SigmaSampler):
    """Linear multistep (Adams-Bashforth) on the derivatives of the last `order` steps."""

    def __init__(self, *args: Any, order: int = 4, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.order = order

    def sample(self, x: Tensor, run: Run) -> Tensor:
        derivatives: list[Tensor] = []
        for i in run.steps:
            sigma, sigma_next = run.s[i], run.s[i + 1]
            derivatives = [*derivatives, to_d(x, sigma, run.denoise(x, i))][-self.order :]
            past_sigmas = run.s[i + 1 - len(derivatives) : i + 1]
            weights = linear_multistep_coefficients(past_sigmas, sigma_next)
            x = x + sum(weight * d for weight, d in zip(weights, derivatives, strict=True))
        return x
