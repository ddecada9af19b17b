"""Causal 3x3x3 convolution with two thirds of the multiplications, for float32 inference on a CPU.

Winograd's minimal filtering F(2, 3) along time (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks",
section 4.1): two output frames of a three-tap filter take four products of frames, here four 2D convolutions,
instead of six. On a GPU and in half precision a plain 3D convolution is faster, or more exact.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `causal_conv3d` applies to this input and is worth it."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.shape[2:] == (3, 3, 3)
        and min(weight.shape[:2]) >= 16  # else the additions outweigh the products that are saved
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def causal_conv3d(before: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve `x` (batch, channel, time, height, width) with a 3x3x3 `weight`, zeros around in space.

    Two frames `before` precede it; None: the first frame, repeated. Returns (batch, len(weight), time, height, width).
    """
    batch, _, time, height, width = x.shape
    frames = [x[:, :, 0], x[:, :, 0]] if before is None else list(before.unbind(2))
    frames += x.unbind(2)
    y = torch.empty((batch, len(weight), time, height, width), memory_format=torch.channels_last_3d)

    g0, g1, g2 = weight.movedim(2, 0).contiguous()  # each tap by itself in memory, or every conv2d would copy it
    if time % 2:
        if before is None:
            y[:, :, 0] = F.conv2d(frames[2], g0 + g1 + g2, bias, padding=1)
        else:
            y[:, :, 0] = F.conv2d(torch.cat(frames[:3], 1), torch.cat([g0, g1, g2], 1), bias, padding=1)
    half_sum, half_middle = (g0 + g2).div_(2), g1 / 2
    plus, minus = half_sum + half_middle, half_sum - half_middle
    mixed = torch.empty_like(frames[-1])
    for t in range(time % 2, time, 2):
        d0, d1, d2, d3 = frames[t : t + 4]
        even, odd = y[:, :, t], y[:, :, t + 1]
        m1 = F.conv2d(torch.add(d1, d2, out=mixed), plus, bias, padding=1)
        m2 = F.conv2d(torch.sub(d2, d1, out=mixed), minus, padding=1)
        torch.add(m1, m2, out=even)
        torch.sub(m1, m2, out=odd)
        del m1, m2
        even += F.conv2d(torch.sub(d0, d2, out=mixed), g0, padding=1)
        odd -= F.conv2d(torch.sub(d1, d3, out=mixed), g2, padding=1)
    return y
