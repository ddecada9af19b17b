"""The weights that an encoder or a decoder starts to train from."""

import math

import torch
from torch import nn

from vae_modules.layers import ResnetBlock3D, SpatialNorm3D

CONDITION = 0.1  # how much of PyTorch's own weights is left of those that scale norms by the latent
NOISE = -4.0  # log-variance of the latents of a new encoder, whose means have a variance of about 1


@torch.no_grad()
def initialize(coder: nn.Module) -> None:
    """Make the signal of a new encoder or decoder neither vanish nor depend on chance more than it must.

    Convolutions keep the variance of what they get: He et al. 2015 (arXiv:1502.01852), eq. 10 with gain 1. Those in
    time start with the tap of the present frame alone, so that frames are not blurred into each other before the
    network has learnt what moves. Blocks start as the identity, their last convolution at zero (Zhang et al. 2019,
    "Fixup", arXiv:1901.09321). Norms that are conditioned on the latent start with a scale conv_y(z) of nearly 1, where
    by default it would be a small number that shrinks the signal again and again.
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
