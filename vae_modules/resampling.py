"""Change the size of video: height and width by a convolution of each frame, and time.

Tensors are (batch, channel, time, height, width) in channels-last memory.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.modules.autoencoding import meta_device
from sgm.modules.autoencoding.clip import Chunk
from vae_modules.convolutions import framewise, left_bias
from vae_modules.passes.products import Product
from vae_modules.passes.resized_sums import doubled_sum, halved_sum
from vae_modules.summands import Summands


class Downsample3D(nn.Module):
    """Halve height and width by a strided convolution, and optionally time by averaging pairs."""

    def __init__(self, channels: int, compress_time: bool):
        super().__init__()
        self.compress_time = compress_time
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Return the smaller `x` (batch, channel, time, height, width).

        Args:
            chunk: with a `lead`, the first frame stands alone in time and has no pair.
        """
        if self.compress_time:
            lead = int(chunk.lead)
            pairs = 0.5 * (x[:, :, lead::2] + x[:, :, lead + 1 :: 2])
            x = torch.cat([x[:, :, :1], pairs], dim=2) if lead else pairs
        return framewise(lambda frames: self.conv(F.pad(frames, (0, 1, 0, 1))), x)

    def run(self, summands: Summands, chunk: Chunk) -> Summands:
        """Return the result of a call for a sum, without gradients."""
        left = left_bias(self.conv)
        bias = self.conv.bias if left is None else None
        padded = halved_sum(*summands.tensors(), summands.offset, self.compress_time, chunk.lead)
        return Summands(
            framewise(lambda frames: F.conv2d(frames, self.conv.weight, bias, stride=2), padded), offset=left
        )


class Upsample3D(nn.Module):
    """Double height, width and optionally time by nearest neighbour; convolve each frame."""

    def __init__(self, channels: int, compress_time: bool):
        super().__init__()
        self.compress_time = compress_time
        self.conv = nn.Conv2d(channels, channels, kernel_size=3)

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Return the larger `x` (batch, channel, time, height, width).

        Args:
            chunk: with a `lead`, the first frame stands alone in time and is not doubled.
        """
        if _takes_sums_of_taps(x):
            x = framewise(partial(self._convolve_small, bias=self.conv.bias), x)
        else:
            x = framewise(self._double_and_convolve, x)
        if self.compress_time:  # after the convolution, which would give equal results for equal frames
            lead = int(chunk.lead)
            doubled = x[:, :, lead:].unsqueeze(3).expand(-1, -1, -1, 2, -1, -1).flatten(2, 3)
            x = torch.cat([x[:, :, :lead], doubled], dim=2)
        return x

    def run(self, summands: Summands, chunk: Chunk, *z: Tensor) -> Summands:
        """Return the result of a call for a sum, without gradients; `z` has no effect.

        Frames are doubled by the operations that follow.
        """
        left = left_bias(self.conv)
        bias = self.conv.bias if left is None else None
        if _takes_sums_of_taps(summands.x):
            x = framewise(partial(self._convolve_small, bias=bias), summands.added(chunk))
        else:
            if summands.repeats or (summands.other is not None and summands.other.shape[2] < summands.frames):
                summands = Summands(summands.added(chunk))
            doubled = doubled_sum(*summands.tensors(), summands.offset)
            x = framewise(lambda frames: F.conv2d(frames, self.conv.weight, bias, padding=1), doubled)
        frames, lead = x.shape[2], int(chunk.lead)
        return Summands(x, None, left, 2 * frames - lead if self.compress_time else frames)

    def _double_and_convolve(self, frames: Tensor) -> Tensor:
        doubled = F.interpolate(frames, scale_factor=2, mode="nearest")
        return F.conv2d(doubled, self.conv.weight, self.conv.bias, padding=1)

    def _convolve_small(self, frames: Tensor, bias: Tensor | None) -> Tensor:
        """Return the convolution of the doubled frames, from the small ones.

        Frames are (batch, channel, height, width). A 3x3 kernel sees only 2x2 different pixels of a doubled image. With
        the sums of the taps for a pixel it is a transposed convolution of the small image, with 4 instead of 9 products
        per pixel.
        """
        weight = self.conv.weight
        kernel = _overlapping_sums(_overlapping_sums(weight, dim=2), dim=3).transpose(0, 1).flip(2, 3)
        return F.conv_transpose2d(frames, kernel, bias, stride=2, padding=1)


def _takes_sums_of_taps(x: Tensor | Product) -> bool:
    """Return whether `_convolve_small` is exact and faster for `x`."""
    return meta_device.type_of(x) == "cpu" and x.dtype == torch.float32


def _overlapping_sums(kernel: Tensor, dim: int) -> Tensor:
    """Return the taps (a, b, c) along `dim` as (a, a + b, b + c, c), for doubled rows."""
    before = torch.cat([kernel, kernel.narrow(dim, 0, 1) * 0], dim)
    return before + before.roll(1, dim)
