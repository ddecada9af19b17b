"""The other path of the image discriminator."""

from sgm.modules.autoencoding.discriminators import ActNorm, NLayerDiscriminator, weights_init

__all__ = ["ActNorm", "NLayerDiscriminator", "weights_init"]
