"""The residual block of the video autoencoder.

Tensors are (batch, channel, time, height, width) in channels-last memory.
"""

import torch
from torch import Tensor, nn

from sgm.modules.autoencoding.clip import Chunk
from vae_modules.convolutions import CausalConv3d, left_bias, pointwise_in_time
from vae_modules.modulation import add_in_place
from vae_modules.normalization import GroupNorm, SpatialNorm3D, normalize_and_convolve


class ResnetBlock3D(nn.Module):
    """Two rounds of norm, SiLU and causal convolution, with a shortcut.

    In a decoder the norms are conditioned on the latent.

    Args:
        latent_channels: of the latent; None: in an encoder.
        gather_norm, norm_groups: see `GroupNorm`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        latent_channels: int | None = None,
        gather_norm: bool = False,
        norm_groups: int = 32,
    ):
        super().__init__()

        def norm(channels: int) -> nn.Module:
            if latent_channels is None:
                return GroupNorm(channels, gather_norm, norm_groups)
            return SpatialNorm3D(channels, latent_channels, gather_norm, norm_groups)

        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3)
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, chunk: Chunk, z: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
        """Return the block's output (batch, out_channels, time, height, width) for `x`.

        Without gradients each round has one buffer, and the shortcut is added in place.

        Args:
            z: the latent (batch, latent_channels, t, h, w) of the same frames, in a decoder.
            offset: (channel,), added to `x` first; see `left_bias`.
        """
        condition = () if z is None else (z,)
        if torch.is_grad_enabled() or (self.training and self.dropout.p):
            x = x if offset is None else x + offset[:, None, None, None]
            h = self.conv1(self.norm1(x, *condition, chunk), chunk)
            h = self.conv2(self.dropout(self.norm2(h, *condition, chunk)), chunk)
            return self.shortcut(x) + h
        held = [self.first_round([x], chunk, *condition, offset=offset)]
        h = self.second_round(held, chunk, *condition)
        return self.add_shortcut(h, self.shortcut(x, biased=False), offset)

    def first_round(
        self,
        held: list[Tensor],
        chunk: Chunk,
        *z: Tensor,
        statistics: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        """Return the first norm and convolution of `held`, without the bias that is left.

        The arguments are those of `normalize_and_convolve`.
        """
        biased = left_bias(self.conv1.conv) is None
        return normalize_and_convolve(
            self.norm1, self.conv1, held, chunk, *z, statistics=statistics, offset=offset, biased=biased
        )

    def second_round(self, held: list[Tensor], chunk: Chunk, *z: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Return the second norm and convolution, of `first_round`'s result, without a left bias."""
        return normalize_and_convolve(
            self.norm2,
            self.conv2,
            held,
            chunk,
            *z,
            statistics=statistics,
            offset=left_bias(self.conv1.conv),
            overwrite=True,
            biased=left_bias(self.conv2.conv) is None,
        )

    def add_shortcut(self, h: Tensor, shortcut: Tensor, offset: Tensor | None) -> Tensor:
        """Return the output from those of `second_round` and `shortcut`, in the memory of `h`.

        Args:
            offset: of the input, see `forward`.
        """
        left = left_bias(self.conv2.conv)
        if hasattr(self, "nin_shortcut"):
            if offset is not None:  # through the shortcut's product
                offset = self.nin_shortcut.weight[:, :, 0, 0, 0] @ offset
            left = left if left is None else left + self.nin_shortcut.bias
        if offset is not None:
            left = offset if left is None else left + offset
        return add_in_place(h, shortcut, left)

    def shortcut(self, x: Tensor, biased: bool = True) -> Tensor:
        """Return the tensor that is added to the result: `x`, or `x` with the result's channels.

        Args:
            biased: add the shortcut's bias, even if it may be left to `add_shortcut`.
        """
        if not hasattr(self, "nin_shortcut"):
            return x
        return pointwise_in_time(self.nin_shortcut, x, biased or left_bias(self.conv2.conv) is None)
