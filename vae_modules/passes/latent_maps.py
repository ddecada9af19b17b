"""The maps from a latent that condition a decoder's norms."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class LatentMaps(NamedTuple):
    """A second scale and shift, at each place of a latent: weight @ latent + bias.

    Attributes:
        latent: (batch, latent_channel, t, h, w).
        scale_weight, shift_weight: (channel, latent_channel).
        scale_bias, shift_bias: (channel,).
    """

    latent: Tensor
    scale_weight: Tensor
    scale_bias: Tensor
    shift_weight: Tensor
    shift_bias: Tensor

    def scale_and_shift(self) -> list[Tensor]:
        """Return both maps (batch, channel, t, h, w)."""
        rows, pairs = self.latent.movedim(1, -1), (self[1:3], self[3:])
        return [F.linear(rows, weight, bias).movedim(-1, 1) for weight, bias in pairs]
