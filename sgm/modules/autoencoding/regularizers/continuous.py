"""Latents of real numbers."""

from torch import Tensor

from sgm.modules.autoencoding.distributions import DiagonalGaussianDistribution
from sgm.modules.autoencoding.regularizers.base import AbstractRegularizer, Log


class IdentityRegularizer(AbstractRegularizer):
    """Latents that are the encoder's output, without a penalty."""

    def forward(self, z: Tensor) -> tuple[Tensor, Log]:
        return z, {}


class DiagonalGaussianRegularizer(AbstractRegularizer):
    """Latents drawn from the encoder's Gaussian (its mean where `sample` is false), penalised by KL divergence."""

    def __init__(self, sample: bool = True):
        super().__init__()
        self.sample = sample

    def use_means(self) -> None:
        """Give the Gaussian's mean from now on, so that nothing is random."""
        self.sample = False

    def forward(self, moments: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Log]:
        """moments (batch, 2 * channel, ...) -> latent (batch, channel, ...) and {"kl_loss": mean over the batch}."""
        posterior = DiagonalGaussianDistribution(moments)
        latent = posterior.sample(noise) if self.sample else posterior.mode()
        return latent, {"kl_loss": posterior.kl().mean()}
