"""The losses of discriminators, by the path of the original."""

from sgm.modules.autoencoding.losses.adversary import adopt_weight, hinge_d_loss, vanilla_d_loss

__all__ = ["adopt_weight", "hinge_d_loss", "vanilla_d_loss"]
