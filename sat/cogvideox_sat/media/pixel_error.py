"""The difference of pictures or clips from others, in decibels."""

import torch
from torch import Tensor


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Return the PSNR of each item in dB, from its mean squared error; infinite if equal.

    Args:
        x, y: (batch, ...) of any dtype, in [-1, 1].

    Returns:
        float32 (batch,).
    """
    error = ((x.float() - y.float()) / 2).square().flatten(1).mean(1)  # of pixels in [0, 1], whose peak is 1
    return -10 * torch.log10(error)
