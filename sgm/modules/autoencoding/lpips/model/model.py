"""The other path of the image discriminator."""

from sgm.modules.autoencoding.discriminators import ActNorm, NLayerDiscriminator

__all__ = ["ActNorm", "NLayerDiscriminator"]
