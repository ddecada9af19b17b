"""The posterior of a variational autoencoder."""

import torch
from torch import Tensor

from sgm import randomness


class DiagonalGaussianDistribution:
    """Independent normals; `moments` (batch, 2 * channel, ...) holds their means, then their log-variances."""

    def __init__(self, moments: Tensor):
        self.mean, log_variance = moments.chunk(2, dim=1)
        self.log_variance = log_variance.clamp(-30.0, 20.0)

    def noise(self) -> Tensor:
        """Standard normals of the shape of one sample, float32 on the CPU, so that a seed means the same everywhere."""
        return randomness.normal(self.mean.shape, purpose="posterior")

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise (batch, channel, ...); the noise is drawn anew unless it is given."""
        noise = self.noise() if noise is None else noise
        return self.mean + torch.exp(0.5 * self.log_variance) * noise.to(self.mean)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """Divergence from the standard normal, (batch,), summed over all other dimensions."""
        terms = self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance
        return 0.5 * terms.flatten(1).sum(1)
