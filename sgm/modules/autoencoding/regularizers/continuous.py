"""Regularizers of continuous latents."""

from torch import Tensor

from sgm.modules.autoencoding.distributions import DiagonalGaussianDistribution
from sgm.modules.autoencoding.regularizers.base import AbstractRegularizer, Log


class IdentityRegularizer(AbstractRegularizer):
    """The encoder's output as the latents, without a penalty."""

    def forward(self, z: Tensor) -> tuple[Tensor, Log]:
        return z, {}


class DiagonalGaussianRegularizer(AbstractRegularizer):
    """Latents drawn from the encoder's Gaussian, with the KL divergence as a penalty.

    Args:
        sample: draw latents; False: use the means.
    """

    def __init__(self, sample: bool = True):
        super().__init__()
        self.sample = sample

    def use_means(self) -> None:
        """Use the Gaussian's mean from now on, so that latents are deterministic."""
        self.sample = False

    def forward(self, moments: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Log]:
        """Return latents (batch, channel, ...) and {"kl_loss": mean over the batch}.

        Args:
            moments: (batch, 2 * channel, ...).
        """
        posterior = DiagonalGaussianDistribution(moments)
        latent = posterior.sample(noise) if self.sample else posterior.mode()
        return latent, {"kl_loss": posterior.kl().mean()}
