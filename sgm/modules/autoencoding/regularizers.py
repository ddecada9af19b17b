"""What turns an encoder's output into a latent, and the penalty that keeps the latents well-behaved."""

from torch import Tensor, nn

from sgm.modules.autoencoding.distributions import DiagonalGaussianDistribution


class DiagonalGaussianRegularizer(nn.Module):
    """Latents drawn from the encoder's Gaussian (its mean where `sample` is false), penalised by KL divergence."""

    def __init__(self, sample: bool = True):
        super().__init__()
        self.sample = sample

    def forward(self, moments: Tensor, noise: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """moments (batch, 2 * channel, ...) -> latent (batch, channel, ...) and {"kl_loss": mean over the batch}."""
        posterior = DiagonalGaussianDistribution(moments)
        latent = posterior.sample(noise) if self.sample else posterior.mode()
        return latent, {"kl_loss": posterior.kl().mean()}
