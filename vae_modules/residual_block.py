"""The residual block of the video autoencoder.

Tensors are (batch, channel, time, height, width) in channels-last memory.
"""

from torch import Tensor, nn

from sgm.modules.autoencoding.clip import Chunk
from vae_modules.convolutions import CausalConv3d, left_bias, pointwise_in_time
from vae_modules.normalization import GroupNorm, SpatialNorm3D, normalize_and_convolve, statistics_of
from vae_modules.passes.products import Product, stay_unwritten, written
from vae_modules.summands import Summands


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

    def forward(self, x: Tensor, chunk: Chunk, z: Tensor | None = None) -> Tensor:
        """Return the block's output (batch, out_channels, time, height, width) for `x`.

        Args:
            z: the latent (batch, latent_channels, t, h, w) of the same frames, in a decoder.
        """
        condition = () if z is None else (z,)
        h = self.conv1(self.norm1(x, *condition, chunk), chunk)
        h = self.conv2(self.dropout(self.norm2(h, *condition, chunk)), chunk)
        return (pointwise_in_time(self.nin_shortcut, x) if self.changes_channels else x) + h

    @property
    def changes_channels(self) -> bool:
        """Return whether the shortcut is a convolution."""
        return hasattr(self, "nin_shortcut")

    def run(self, summands: Summands, chunk: Chunk, *z: Tensor) -> Summands:
        """Return the block's output for a sum, without gradients and dropout.

        The sum is taken while the first norm's statistics are, and each round has one buffer.
        """
        statistics = statistics_of(summands, self.norm1, chunk)
        held = [self.first_round([summands], chunk, *z, statistics=statistics)]
        h = self.second_round(held, chunk, *z)
        return self.with_shortcut(h, self.shortcut(summands.x, not summands.repeats), summands.offset)

    def first_round(self, held: list[Summands], chunk: Chunk, *z: Tensor, statistics: Tensor) -> Summands:
        """Return the first norm and convolution of `held`; see `normalize_and_convolve`."""
        left = left_bias(self.conv1.conv)
        h = normalize_and_convolve(self.norm1, self.conv1, held, chunk, *z, statistics=statistics, biased=left is None)
        return Summands(h, offset=left)

    def second_round(self, held: list[Summands], chunk: Chunk, *z: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Return the second norm and convolution of `first_round`'s result, without a left bias."""
        return normalize_and_convolve(
            self.norm2,
            self.conv2,
            held,
            chunk,
            *z,
            statistics=statistics,
            overwrite=True,
            biased=left_bias(self.conv2.conv) is None,
        )

    def with_shortcut(self, h: Tensor, shortcut: Tensor | Product, offset: Tensor | None) -> Summands:
        """Return the block's output.

        Args:
            h: the result of `second_round`.
            shortcut: that of the input.
            offset: (channel,), still to be added to the input.
        """
        left = left_bias(self.conv2.conv)
        if left is None:
            return Summands(h, shortcut)
        if self.changes_channels:
            left = left + self.nin_shortcut.bias
            if offset is not None:  # through the shortcut's product
                offset = self.nin_shortcut.weight.flatten(1) @ offset
        return Summands(h, shortcut, left if offset is None else left + offset)

    def shortcut(self, x: Tensor | Product, may_stay_unwritten: bool) -> Tensor | Product:
        """Return what is added to the result: `x`, or `x` with the result's channels.

        A bias is left to `with_shortcut` if that of the last convolution is.

        Args:
            may_stay_unwritten: return a `Product` if that is faster.
        """
        if not self.changes_channels:
            return x
        biased, x, weight = left_bias(self.conv2.conv) is None, written(x), self.nin_shortcut.weight
        if may_stay_unwritten and not biased and stay_unwritten(x, weight):
            return Product(x, weight)
        return pointwise_in_time(self.nin_shortcut, x, biased)
