"""The posterior of a variational autoencoder."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sgm import randomness


class DiagonalGaussianDistribution:
    """Independent normal distributions, the posterior of a variational autoencoder.

    Args:
        moments: (batch, 2 * channel, ...), the means followed by the log-variances.
        deterministic: the variance is zero, and samples are the mean.

    Attributes:
        mean, std, var, log_variance: (batch, channel, ...), for each place; `logvar` is another name of `log_variance`.
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
        """Return the standard deviation, zeros if the distribution is deterministic."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.log_variance)

    @property
    def var(self) -> Tensor:
        """Return the variance, zeros if the distribution is deterministic."""
        return torch.zeros_like(self.mean) if self.deterministic else self.log_variance.exp()

    def noise(self) -> Tensor:
        """Return standard normal noise shaped like one sample, float32 on the CPU.

        The CPU makes a seed give the same noise on every device.
        """
        return randomness.normal(self.mean.shape, purpose="posterior")

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Return mean + std * noise (batch, channel, ...).

        Args:
            noise: as `noise` returns it; None: drawn here.
        """
        if self.deterministic:
            return self.mean
        noise = self.noise() if noise is None else noise
        return self.mean + torch.exp(0.5 * self.log_variance) * noise.to(self.mean)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self, other: "DiagonalGaussianDistribution | None" = None) -> Tensor:
        """Return the KL divergence from `other`, or from the standard normal: (batch,), in nats.

        The divergence is summed over all other dimensions, and zero if the distribution is deterministic.
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
        """Return the negative log-density at `sample` (batch, channel, ...), summed over `dims`.

        The value is zero if the distribution is deterministic.
        """
        if self.deterministic:
            return self.mean.new_zeros(len(self.mean))
        terms = math.log(2 * math.pi) + self.log_variance + (sample - self.mean).square() / self.log_variance.exp()
        return 0.5 * terms.sum(tuple(dims))
