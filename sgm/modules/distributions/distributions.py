"""Distributions of latents under the original's path, and the divergence of two normals."""

import torch
from torch import Tensor

from sgm.modules.autoencoding.distributions import DiagonalGaussianDistribution

__all__ = ["AbstractDistribution", "DiagonalGaussianDistribution", "DiracDistribution", "normal_kl"]


class AbstractDistribution:
    """The interface of a distribution of latents."""

    def sample(self) -> Tensor:
        """Return a sample."""
        raise NotImplementedError

    def mode(self) -> Tensor:
        """Return the most likely value."""
        raise NotImplementedError


class DiracDistribution(AbstractDistribution):
    """A distribution with a single value."""

    def __init__(self, value: Tensor):
        self.value = value

    def sample(self) -> Tensor:
        """Return the value."""
        return self.value

    def mode(self) -> Tensor:
        """Return the value."""
        return self.value


def normal_kl(mean1: float | Tensor, logvar1: float | Tensor, mean2: float | Tensor, logvar2: float | Tensor) -> Tensor:
    """Return the KL divergence of N(mean1, e^logvar1) from N(mean2, e^logvar2), in nats.

    The divergence is computed for each element of the tensors.
    """
    like = next(each for each in (mean1, logvar1, mean2, logvar2) if isinstance(each, Tensor))
    mean1, logvar1, mean2, logvar2 = (
        torch.as_tensor(each, dtype=like.dtype, device=like.device) for each in (mean1, logvar1, mean2, logvar2)
    )
    ratio = (logvar1 - logvar2).exp()
    return 0.5 * (ratio + (mean1 - mean2).square() * (-logvar2).exp() - 1.0 + logvar2 - logvar1)
