"""The posterior of a variational autoencoder."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sgm import randomness


class DiagonalGaussianDistribution:
    """Independent normals; `moments` (batch, 2 * channel, ...) holds their means, then their log-variances.

    Args:
        deterministic: there is no variance: samples are the mean.

    Attributes:
        mean, std, var, log_variance: of each place, (batch, channel, ...); `logvar` is another name of the last.
    """

    def __init__(self, moments: Tensor, deterministic: bool = False):
        self.parameters, self.deterministic = moments, deterministic
        self.mean, log_variance = moments.chunk(2, dim=1)
        self.log_variance = log_variance.clamp(-30.0, 20.0)

    @property
    def logvar(self) -> Tensor:
        """Return the logarithm of the variance."""
        return self.log_variance

    @property
    def std(self) -> Tensor:
        """Return the standard deviation; zeros without a variance."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.log_variance)

    @property
    def var(self) -> Tensor:
        """Return the variance; zeros without one."""
        return torch.zeros_like(self.mean) if self.deterministic else self.log_variance.exp()

    def noise(self) -> Tensor:
        """Standard normals of the shape of one sample, float32 on the CPU, so that a seed means the same everywhere."""
        return randomness.normal(self.mean.shape, purpose="posterior")

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise (batch, channel, ...); the noise is drawn anew unless it is given."""
        if self.deterministic:
            return self.mean
        noise = self.noise() if noise is None else noise
        return self.mean + torch.exp(0.5 * self.log_variance) * noise.to(self.mean)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """Return the divergence from `other`, or from the standard normal: (batch,), summed over all other dimensions.

        Without a variance it is zero.
        """
        if self.deterministic:
            return self.mean.new_zeros(len(self.mean))
        if other is None:
            terms = self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance
        else:
            difference = self.log_variance - other.log_variance
            terms = (self.mean - other.mean).square() / other.var + difference.exp() - 1.0 - difference
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Return minus the logarithm of the density at `sample` (batch, channel, ...), summed over `dims`.

        Without a variance it is zero.
        """
        if self.deterministic:
            return self.mean.new_zeros(len(self.mean))
        terms = math.log(2 * math.pi) + self.log_variance + (sample - self.mean).square() / self.log_variance.exp()
        return 0.5 * terms.sum(tuple(dims))
