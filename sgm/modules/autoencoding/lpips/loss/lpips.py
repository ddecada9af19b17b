"""The other path of the perceptual distance."""

from sgm.modules.autoencoding.losses.lpips import LPIPS

__all__ = ["LPIPS"]
