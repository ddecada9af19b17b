"""Parts that several samplers share: random numbers, and the formulas of a step."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sgm.errors import UserError
from sgm.modules.diffusionmodules.thresholding import (
    DynamicThresholding,
    DynamicThresholdingV1,
    DynamicThresholdingV2,
    NoDynamicThresholding,
    StaticThresholding,
)
from sgm.modules.diffusionmodules.util import append_dims

__all__ = [
    "DynamicThresholding",
    "DynamicThresholdingV1",
    "DynamicThresholdingV2",
    "Generators",
    "NoDynamicThresholding",
    "StaticThresholding",
    "ancestral_step",
    "check_schedule_of_sigma",
    "draw_noise",
    "get_ancestral_step",
    "half_log_snr",
    "linear_multistep_coeff",
    "linear_multistep_coefficients",
    "noise_like",
    "steps_of_call",
    "to_d",
    "to_neg_log_sigma",
    "to_sigma",
]

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


def steps_of_call(given: int | None, configured: int | None) -> int:
    """Return the number of steps of a sampler's call, by default the configured number.

    Raises:
        UserError: neither number is known.
    """
    num_steps = configured if given is None else given
    if num_steps is None:
        raise UserError("sampler_config: num_steps: missing; set it there or pass it when sampling")
    return num_steps


def check_schedule_of_sigma(sampler: Any, discretization: Any) -> None:
    """Check that a noise schedule gives σ, for a sampler that needs σ.

    Raises:
        UserError: the schedule gives a = sqrt(ᾱ).
    """
    if discretization.gives_alpha:
        raise UserError(
            f"sampler_config: {type(sampler).__name__} needs a schedule of sigma, which "
            f"{type(discretization).__name__} is not; use EDMDiscretization or LegacyDDPMDiscretization"
        )


def draw_noise(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return N(0, 1) noise of `shape` (batch, ...) on `device`.

    Args:
        generator: source of the numbers. None: the global generator of `device`. One generator: the noise is drawn on
            its device, then moved, so that a CPU generator gives the same noise for every device. A sequence, one for
            each sample: a sample's noise depends on its own generator only.

    Raises:
        UserError: the number of generators is not the batch size.
    """
    if generator is None or isinstance(generator, torch.Generator):
        drawn_on = device if generator is None else generator.device
        return torch.randn(*shape, generator=generator, device=drawn_on, dtype=dtype).to(device)
    batch, *rest = shape
    if len(generator) != batch:
        raise UserError(f"generator: {len(generator)} generators for a batch of {batch}; give one for each sample")
    return torch.cat([draw_noise((1, *rest), each, device, dtype) for each in generator])


def noise_like(x: Tensor, generator: Generators = None) -> Tensor:
    """Return N(0, 1) noise of the shape, device and dtype of `x`; see `draw_noise`."""
    return draw_noise(x.shape, generator, x.device, x.dtype)


def half_log_snr(a: float, s: float) -> float:
    """Return λ = log(a/s) of x = a·x0 + s·ε, −∞ for pure noise.

    Lu et al. 2022, DPM-Solver; s > 0.
    """
    return math.log(a / s) if a > 0 else -math.inf


def to_d(x: Tensor, sigma: float | Tensor, denoised: Tensor) -> Tensor:
    """Return the derivative dx/dσ of the probability flow (Karras et al. 2022, equation 3).

    Args:
        sigma: one σ, or one for each sample.
    """
    return (x - denoised) / (append_dims(sigma, x.ndim) if isinstance(sigma, Tensor) else sigma)


def ancestral_step(sigma_from: float, sigma_to: float, eta: float = 1.0) -> tuple[float, float]:
    """Return (σ_down, σ_up) of an ancestral step: a step to σ_down, then noise σ_up.

    The step ends at `sigma_to` = sqrt(σ_down² + σ_up²).
    """
    sigma_up = min(sigma_to, eta * sigma_to * math.sqrt(1 - (sigma_to / sigma_from) ** 2))
    return math.sqrt(sigma_to**2 - sigma_up**2), sigma_up


def get_ancestral_step(sigma_from: Tensor, sigma_to: Tensor, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return (σ_down, σ_up) as `ancestral_step`, for tensors."""
    if not eta:
        return sigma_to, torch.zeros_like(sigma_to)
    sigma_up = torch.minimum(sigma_to, eta * sigma_to * (1 - (sigma_to / sigma_from) ** 2).clamp_min(0) ** 0.5)
    return (sigma_to**2 - sigma_up**2) ** 0.5, sigma_up


def to_neg_log_sigma(sigma: Tensor) -> Tensor:
    """Return −log σ."""
    return -sigma.log()


def to_sigma(neg_log_sigma: Tensor) -> Tensor:
    """Return σ of −log σ."""
    return (-neg_log_sigma).exp()


def linear_multistep_coeff(order: int, t: Sequence[float], i: int, j: int) -> float:
    """Return the weight, in step `i` of the levels `t`, of the derivative `j` steps before.

    Raises:
        ValueError: step `i` has fewer than `order` derivatives.
    """
    if order - 1 > i:
        raise ValueError(f"order {order} is too high for step {i}")
    past = [float(level) for level in t[i + 1 - order : i + 1]]
    return linear_multistep_coefficients(past, float(t[i + 1]))[order - 1 - j]


def linear_multistep_coefficients(sigmas: Sequence[float], sigma_to: float) -> list[float]:
    """Return the weights of the last derivatives in a step from `sigmas[-1]` to `sigma_to`.

    The newest is last. The weights are integrals over the step of the Lagrange polynomials on `sigmas`, the levels of
    the derivatives (Adams-Bashforth with unequal steps).
    """
    # Centred on the step's start, to keep precision for nearby levels.
    nodes, end = np.asarray(sigmas) - sigmas[-1], sigma_to - sigmas[-1]
    weights = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        polynomial = np.poly1d(others, r=True) / np.prod(node - others)
        weights.append(float(polynomial.integ()(end)))
    return weights
