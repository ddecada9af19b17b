"""Change the size of video: height and width by a convolution of each frame, and time.

Tensors are (batch, channel, time, height, width) in channels-last memory.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.modules.autoencoding.clip import Chunk
from vae_modules.convolutions import framewise


class Downsample3D(nn.Module):
    """Halve height and width by a strided convolution, and optionally time by averaging pairs."""

    def __init__(self, channels: int, compress_time: bool):
        super().__init__()
        self.compress_time = compress_time
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor, chunk: Chunk, biased: bool = True) -> Tensor:
        """Return the smaller `x` (batch, channel, time, height, width).

        Args:
            chunk: with a `lead`, the first frame stands alone in time and has no pair.
            biased: add the bias of the convolution.
        """
        if not torch.is_grad_enabled():
            weight, bias = self.conv.weight, self.conv.bias if biased else None
            padded = self._halved_in_time_and_padded(x, int(chunk.lead))
            return framewise(lambda frames: F.conv2d(frames, weight, bias, stride=2), padded)
        if self.compress_time:
            lead = int(chunk.lead)
            pairs = 0.5 * (x[:, :, lead::2] + x[:, :, lead + 1 :: 2])
            x = torch.cat([x[:, :, :1], pairs], dim=2) if lead else pairs
        return framewise(lambda frames: self.conv(F.pad(frames, (0, 1, 0, 1))), x)

    def _halved_in_time_and_padded(self, x: Tensor, lead: int) -> Tensor:
        """Return the convolution's input, with a row and a column of zeros, written once."""
        batch, channels, time, height, width = x.shape
        frames = lead + (time - lead) // 2 if self.compress_time else time
        shape = (batch, channels, frames, height + 1, width + 1)
        padded = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        padded[..., -1, :].zero_()
        padded[..., -1].zero_()
        inner = padded[..., :-1, :-1]
        if not self.compress_time:
            inner.copy_(x)
            return padded
        inner[:, :, :lead] = x[:, :, :lead]
        if frames > lead:
            torch.lerp(x[:, :, lead::2], x[:, :, lead + 1 :: 2], 0.5, out=inner[:, :, lead:])
        return padded


class Upsample3D(nn.Module):
    """Double height, width and optionally time by nearest neighbour; convolve each frame."""

    def __init__(self, channels: int, compress_time: bool):
        super().__init__()
        self.compress_time = compress_time
        self.conv = nn.Conv2d(channels, channels, kernel_size=3)

    def forward(self, x: Tensor, chunk: Chunk, biased: bool = True) -> Tensor:
        """Return the larger `x` (batch, channel, time, height, width).

        Args:
            chunk: with a `lead`, the first frame stands alone in time and is not doubled.
            biased: add the bias of the convolution.
        """
        x = framewise(partial(self._double_and_convolve, bias=self.conv.bias if biased else None), x)
        if self.compress_time:  # after the convolution, which would give equal results for equal frames
            lead = int(chunk.lead)
            first, rest = x[:, :, :lead], x[:, :, lead:]
            if not torch.is_grad_enabled():
                return _doubled_in_time(first, rest)
            doubled = rest.unsqueeze(3).expand(-1, -1, -1, 2, -1, -1).flatten(2, 3)
            x = torch.cat([first, doubled], dim=2)
        return x

    def _double_and_convolve(self, frames: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.conv.weight
        if frames.device.type != "cpu" or frames.dtype != torch.float32:  # the method below is inexact or slower
            return F.conv2d(F.interpolate(frames, scale_factor=2, mode="nearest"), weight, bias, padding=1)
        # A 3x3 kernel sees only 2x2 different pixels of a doubled image. With the sums of the taps for a pixel it is a
        # transposed convolution of the small image, with 4 instead of 9 products per pixel.
        kernel = _overlapping_sums(_overlapping_sums(weight, dim=2), dim=3).transpose(0, 1).flip(2, 3)
        return F.conv_transpose2d(frames, kernel, bias, stride=2, padding=1)


def _doubled_in_time(first: Tensor, rest: Tensor) -> Tensor:
    """Return the frames of `first`, and each frame of `rest` twice, written once."""
    shape = (*first.shape[:2], first.shape[2] + 2 * rest.shape[2], *first.shape[3:])
    out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=torch.channels_last_3d)
    out[:, :, : first.shape[2]] = first
    out[:, :, first.shape[2] :].unflatten(2, (rest.shape[2], 2)).copy_(rest.unsqueeze(3))
    return out


def _overlapping_sums(kernel: Tensor, dim: int) -> Tensor:
    """Return the taps (a, b, c) along `dim` as (a, a + b, b + c, c), for doubled rows."""
    before = torch.cat([kernel, kernel.narrow(dim, 0, 1) * 0], dim)
    return before + before.roll(1, dim)
