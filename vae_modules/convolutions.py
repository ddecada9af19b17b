"""Causal convolution of video, and convolutions that treat each frame alone.

Tensors are (batch, channel, time, height, width) in channels-last memory.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.modules.autoencoding import meta_device
from sgm.modules.autoencoding.clip import Chunk
from vae_modules import winograd
from vae_modules.passes.products import Product, stay_unwritten
from vae_modules.summands import Summands

FEW = 4
"""Convolutions of few input channels take other paths: on a CPU of less than this number (oneDNN has no float32 3D
convolution for them), on a GPU also of this number (cuDNN is slow)."""


def leaves_bias(weight: Tensor) -> bool:
    """Return whether a convolution with this weight leaves its bias to the next operation.

    The result is true on a GPU without gradients, where PyTorch adds the bias in another pass over the
    result; on a CPU PyTorch adds the bias within the convolution.
    """
    return meta_device.type_of(weight) != "cpu" and not torch.is_grad_enabled()


def left_bias(conv: nn.Conv2d | nn.Conv3d) -> Tensor | None:
    """Return the bias (channel,) that a convolution leaves to the next operation, or None."""
    return conv.bias if leaves_bias(conv.weight) else None


class CausalConv3d(nn.Module):
    """A 3D convolution that only sees the present and earlier frames.

    The frames before the clip are copies of its first frame. Space is padded with zeros; time, height and width keep
    their sizes.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size)

    def forward(self, x: Tensor, chunk: Chunk, biased: bool = True) -> Tensor:
        """Return the convolution of `x` (batch, channel, time, height, width).

        `chunk` has the frames before `x`.
        """
        weight, bias = self.conv.weight, self.conv.bias if biased else None
        time, height, width = self.conv.kernel_size
        padding = (0, height // 2, width // 2)
        if time == 1:
            return pointwise_in_time(self.conv, x, biased)
        before = chunk.frames_before(self, x, time - 1)
        if x.shape[2] == 0:  # a rank without frames: no output, but a node in the graph for the frames that it sent
            return F.conv3d(F.pad(before, (0, 0, 0, 0, 0, 1)), weight, bias, padding=padding)[:, :, :0]
        if before is None and x.shape[2] == 1 and x.dtype == torch.float32:  # all taps see the same frame
            return F.conv3d(x, weight.sum(2, keepdim=True), bias, padding=padding)
        if winograd.serves(x, weight):
            return winograd.causal_conv3d(before, x, weight, bias)
        if before is None:
            before = x[:, :, :1].expand(-1, -1, time - 1, -1, -1)
        frames = torch.cat([before, x], dim=2)
        if meta_device.type_of(x) == "cpu" and x.dtype == torch.float32 and self.conv.in_channels < FEW:
            return _with_time_in_channels(self.conv, frames, biased)
        return F.conv3d(frames, weight, bias, padding=padding)

    def forward_over(self, x: Tensor, chunk: Chunk, biased: bool = True) -> Tensor:
        """Return the result of a call, without gradients; `x` may be overwritten."""
        # Frames that are being sent to another rank must not change.
        if chunk.group is None and x.shape[2] > 1 and winograd.serves(x, self.conv.weight):
            before = chunk.frames_before(self, x, self.conv.kernel_size[0] - 1)
            return winograd.overwriting_conv3d(before, x, self.conv.weight, self.conv.bias if biased else None)
        return self(x, chunk, biased)

    def run(self, summands: Summands, chunk: Chunk, *z: Tensor) -> Summands:
        """Return the convolution of a sum, without gradients; the latent `z` has no effect."""
        x, left = summands.added(chunk), left_bias(self.conv)
        time, height, width = self.conv.kernel_size
        small = self.conv.in_channels <= FEW and time > 1 and x.shape[2] > 0 and len(chunk.parts) < 2
        if left is None or not small or not stay_unwritten(x, self.conv.weight):
            return Summands(self(x, chunk, biased=left is None), offset=left)
        before = chunk.frames_before(self, x, time - 1)
        if before is None:
            before = x[:, :, :1].expand(-1, -1, time - 1, -1, -1)
        more = FEW - self.conv.in_channels  # a row of `FEW` channels is read at once
        space = (width // 2, width // 2, height // 2, height // 2, 0, 0, 0, more)
        frames = F.pad(torch.cat([before, x], dim=2), space).contiguous(memory_format=torch.channels_last_3d)
        return Summands(Product(frames, F.pad(self.conv.weight, (0, 0, 0, 0, 0, 0, 0, more))), offset=left)

    def gains_by_buffer(self, x: Tensor, frames: int) -> bool:
        """Return whether `convolve_buffer` supports `frames` like those of `x`, and saves a copy.

        Only without gradients.
        """
        same = frames == 1 and x.dtype == torch.float32  # `forward` is faster for a single frame
        return not (torch.is_grad_enabled() or frames == 0 or same or winograd.serves(x, self.conv.weight, frames))

    def convolve_buffer(self, buffer: Tensor, chunk: Chunk, biased: bool = True, tail: Tensor | None = None) -> Tensor:
        """Return the convolution of all but the first `kernel - 1` frames of a buffer.

        The frames before are written to the place of these, which avoids a concatenation.

        Args:
            buffer: (batch, channel, kernel - 1 + time, height, width).
            tail: a copy of the last `kernel - 1` frames, or None; see `Chunk.copies_tail`.
        """
        time, height, width = self.conv.kernel_size
        x = buffer[:, :, time - 1 :]
        before = chunk.frames_before(self, x, time - 1, tail)
        buffer[:, :, : time - 1] = x[:, :, :1] if before is None else before
        bias = self.conv.bias if biased else None
        return F.conv3d(buffer, self.conv.weight, bias, padding=(0, height // 2, width // 2))


def _with_time_in_channels(conv: nn.Conv3d, frames: Tensor, biased: bool) -> Tensor:
    """Apply a convolution without padding in time as a 2D convolution.

    The images have the channels of all frames that the kernel sees.
    """
    time, height, width = conv.kernel_size
    count = frames.shape[2] - time + 1
    seen = torch.cat([frames[:, :, tap : tap + count] for tap in range(time)], dim=1)
    seen = seen.contiguous(memory_format=torch.channels_last_3d)
    kernel = conv.weight.transpose(1, 2).flatten(1, 2)
    bias = conv.bias if biased else None
    return framewise(lambda x: F.conv2d(x, kernel, bias, padding=(height // 2, width // 2)), seen)


def pointwise_in_time(conv: nn.Conv3d, x: Tensor, biased: bool = True) -> Tensor:
    """Apply a convolution of length 1 in time.

    Unlike a 3D convolution it also supports an input without frames.
    """
    if biased and conv.kernel_size == (1, 1, 1) and leaves_bias(conv.weight):
        # A matrix product adds the bias while writing its result.
        return F.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias).movedim(-1, 1)
    padding = [size // 2 for size in conv.kernel_size[1:]]
    bias = conv.bias if biased else None
    return framewise(lambda frames: F.conv2d(frames, conv.weight[:, :, 0], bias, padding=padding), x)


def framewise(operation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an image operation to every frame of `x`."""
    batch, time = x.shape[0], x.shape[2]
    y = operation(x.transpose(1, 2).flatten(0, 1))  # b c t h w -> (b t) c h w
    return y.unflatten(0, (batch, time)).transpose(1, 2)
