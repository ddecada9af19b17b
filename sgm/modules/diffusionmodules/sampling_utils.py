"""The parts that several samplers share: random numbers, and the formulas of a step."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sgm.errors import UserError

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_noise(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """N(0, 1) noise of `shape` (batch, ...) on `device`.

    Args:
        generator: where the numbers come from. None: the global generator of `device`. One generator: drawn on its
            own device, then moved, so that a CPU generator gives the same noise for every device. A sequence, one for
            each sample: a sample's noise depends on its own generator alone, whatever the batch.

    Raises:
        UserError: the number of generators is not the batch size.
    """
    if generator is None or isinstance(generator, torch.Generator):
        drawn_on = device if generator is None else generator.device
        return torch.randn(*shape, generator=generator, device=drawn_on, dtype=dtype).to(device)
    batch, *rest = shape
    if len(generator) != batch:
        raise UserError(f"there are {len(generator)} random generators for a batch of {batch}; one a sample would fit")
    return torch.cat([draw_noise((1, *rest), each, device, dtype) for each in generator])


def noise_like(x: Tensor, generator: Generators = None) -> Tensor:
    """N(0, 1) noise of the shape, device and dtype of `x`; see `draw_noise`."""
    return draw_noise(x.shape, generator, x.device, x.dtype)


def half_log_snr(a: float, s: float) -> float:
    """λ = log(a/s) of x = a·x0 + s·ε, s > 0; −∞ for pure noise (Lu et al. 2022, DPM-Solver)."""
    return math.log(a / s) if a > 0 else -math.inf


def to_d(x: Tensor, sigma: float, denoised: Tensor) -> Tensor:
    """The derivative dx/dσ of the probability flow (Karras et al. 2022, equation 3)."""
    return (x - denoised) / sigma


def ancestral_step(sigma_from: float, sigma_to: float, eta: float = 1.0) -> tuple[float, float]:
    """(σ_down, σ_up): a step down to σ_down, then noise σ_up, ends at `sigma_to` = sqrt(σ_down² + σ_up²)."""
    sigma_up = min(sigma_to, eta * sigma_to * math.sqrt(1 - (sigma_to / sigma_from) ** 2))
    return math.sqrt(sigma_to**2 - sigma_up**2), sigma_up


def linear_multistep_coefficients(sigmas: Sequence[float], sigma_to: float) -> list[float]:
    """Weights of the last derivatives in a step from `sigmas[-1]` to `sigma_to`, newest last.

    They are the integrals over the step of the Lagrange polynomials on `sigmas`, the levels where the derivatives
    were taken (Adams-Bashforth with unequal steps).
    """
    # Centred on the step's start, so that nearby levels keep their digits.
    nodes, end = np.asarray(sigmas) - sigmas[-1], sigma_to - sigmas[-1]
    weights = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        polynomial = np.poly1d(others, r=True) / np.prod(node - others)
        weights.append(float(polynomial.integ()(end)))
    return weights
