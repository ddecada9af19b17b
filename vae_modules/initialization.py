"""Initial weights of an encoder or a decoder."""

import math

import torch
from torch import nn

from vae_modules.normalization import SpatialNorm3D
from vae_modules.residual_block import ResnetBlock3D

CONDITION = 0.1  # factor of PyTorch's initial weights for the maps that scale norms by the latent
NOISE = -4.0  # log-variance of the latents of a new encoder; the variance of its means is about 1


@torch.no_grad()
def initialize(coder: nn.Module) -> None:
    """Set the weights of a new encoder or decoder such that signals keep their variance.

    Convolutions keep the variance of their input: He et al. 2015 (arXiv:1502.01852), eq. 10 with gain 1. Convolutions
    in time start with only the tap of the present frame, so that frames are not blurred before the network has learnt
    motion. Blocks start as the identity, with a last convolution of zero (Zhang et al. 2019, "Fixup",
    arXiv:1901.09321). Norms conditioned on the latent start with a scale conv_y(z) near 1; PyTorch's default is a small
    number, which would shrink the signal at every norm.
    """
    for module in coder.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            present = module.weight if module.weight.ndim == 4 else module.weight[:, :, -1:]
            fan_in = present[0].numel()
            present.uniform_(-math.sqrt(3 / fan_in), math.sqrt(3 / fan_in))
            if module.weight.ndim == 5:
                module.weight[:, :, :-1] = 0
            nn.init.zeros_(module.bias)
    for module in coder.modules():
        if isinstance(module, ResnetBlock3D):
            nn.init.zeros_(module.conv2.conv.weight)
        elif isinstance(module, SpatialNorm3D):
            module.conv_y.conv.weight.mul_(CONDITION / math.sqrt(3))
            nn.init.ones_(module.conv_y.conv.bias)
