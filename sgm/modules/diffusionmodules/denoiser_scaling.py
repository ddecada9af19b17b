"""Scalings of a denoiser: D = c_skip·x + c_out·network(c_in·x, c_noise).

Each scaling maps noise levels, (batch,) or broadcastable, to (c_skip, c_out, c_in, c_noise), as in Karras et al. 2022
("EDM", section 5). `takes_alpha` is true for a scaling of a = sqrt(ᾱ) rather than σ.
"""

from typing import Any, Protocol

from torch import Tensor

Scales = tuple[Tensor, Tensor, Tensor, Tensor]


class DenoiserScaling(Protocol):
    """A function of the noise levels and of the network's other inputs."""

    takes_alpha: bool

    def __call__(self, level: Tensor, **model_inputs: Any) -> Scales: ...


class EDMScaling:
    """Unit variance at the network's input and target (Karras et al. 2022, table 1)."""

    takes_alpha = False

    def __init__(self, sigma_data: float = 0.5):
        self.sigma_data = sigma_data

    def __call__(self, sigma: Tensor, **model_inputs: Any) -> Scales:
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance**0.5
        c_in = variance**-0.5
        c_noise = 0.25 * sigma.log()
        return c_skip, c_out, c_in, c_noise


class EpsScaling:
    """The network predicts the noise ε (Ho et al. 2020)."""

    takes_alpha = False

    def __call__(self, sigma: Tensor, **model_inputs: Any) -> Scales:
        return sigma.new_ones(sigma.shape), -sigma, (sigma**2 + 1.0) ** -0.5, sigma


class VScaling:
    """The network predicts the velocity v (Salimans and Ho 2022)."""

    takes_alpha = False

    def __call__(self, sigma: Tensor, **model_inputs: Any) -> Scales:
        variance = sigma**2 + 1.0
        return 1.0 / variance, -sigma * variance**-0.5, variance**-0.5, sigma


class VScalingWithEDMcNoise(VScaling):
    """`VScaling` with the c_noise of `EDMScaling`."""

    def __call__(self, sigma: Tensor, **model_inputs: Any) -> Scales:
        c_skip, c_out, c_in, _ = super().__call__(sigma)
        return c_skip, c_out, c_in, 0.25 * sigma.log()


class VideoScaling:
    """The network predicts the velocity v, with the timestep `idx` as its noise input.

    v is that of x = a·x0 + sqrt(1 − a²)·ε.
    """

    takes_alpha = True

    def __call__(self, alpha: Tensor, *, idx: Tensor, **model_inputs: Any) -> Scales:
        return alpha, -((1.0 - alpha**2) ** 0.5), alpha.new_ones(alpha.shape), idx
