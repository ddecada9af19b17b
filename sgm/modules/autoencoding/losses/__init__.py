"""Losses of autoencoders."""

from sgm.modules.autoencoding.losses.discriminator_loss import GeneralLPIPSWithDiscriminator
from sgm.modules.autoencoding.losses.lpips import LatentLPIPS

__all__ = ["GeneralLPIPSWithDiscriminator", "LatentLPIPS"]
