"""Weights of the squared error |D − x0|² in the loss: σ (batch,) → weights (batch,)."""

import torch
from torch import Tensor


class UnitWeighting:
    """The same weight for every noise level."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


class EDMWeighting:
    """1/c_out² of `EDMScaling`, a unit weight on the network's output.

    Karras et al. 2022, table 1.
    """

    def __init__(self, sigma_data: float = 0.5):
        self.sigma_data = sigma_data

    def __call__(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class VWeighting(EDMWeighting):
    """The squared error of the velocity v: SNR + 1 (Salimans and Ho 2022)."""

    def __init__(self) -> None:
        super().__init__(sigma_data=1.0)


class EpsWeighting:
    """The squared error of the noise ε: the SNR (Ho et al. 2020)."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return sigma**-2.0
