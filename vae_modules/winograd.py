"""Causal 3x3x3 convolution with about half of the products, for float32 on a CPU.

The convolution has a backward pass. Winograd's minimal filtering F(n, 3) along time (Lavin & Gray, "Fast Algorithms for
Convolutional Neural Networks", section 4.1): n output frames of a three-tap filter take n + 2 products of frames, here
2D convolutions, instead of 3n. On a GPU and in half precision a plain 3D convolution is faster, or more exact.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vae_modules.passes.pieces_in_cache import empty_channels_last


def serves(x: Tensor, weight: Tensor) -> bool:
    """Return whether `causal_conv3d` supports this input and is faster."""
    applies = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.shape[2:] == (3, 3, 3)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
    # The method adds frames and makes six kernels of three; for small layers this costs more than it saves.
    cached, pixels = weight.numel() < 2**20, x.shape[0] * x.shape[3] * x.shape[4]
    return applies and min(weight.shape[:2]) >= 16 and (cached or pixels >= 256)


def causal_conv3d(before: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution of `x` with a 3x3x3 `weight`, space padded with zeros.

    Only the arguments are kept for the backward pass.

    Args:
        before: the two frames before `x`; None: copies of its first frame.
        x: (batch, channel, time, height, width).

    Returns:
        (batch, len(weight), time, height, width).
    """
    return _CausalConv3d.apply(before, x, weight, bias)


def overwriting_conv3d(before: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `causal_conv3d` without gradients, in the memory of `x` if the shape fits.

    Allocating new memory would be slow.
    """
    out = x if x.shape[1] == len(weight) else _empty_result(x, weight)
    _convolve(before, x, weight, bias, out)
    return out


# ---------------------------------------------------------------- minimal filtering


class Filtering(NamedTuple):
    """A filter of three taps g: n + 2 inputs d give n outputs.

    outputs @ ((taps @ g) * (inputs @ d)). All outputs have the first product with the factor 1. Matrices are lists of
    rows of floats.
    """

    inputs: list[list[float]]
    taps: list[list[float]]
    outputs: list[list[float]]


def _minimal_filtering(points: Sequence[float]) -> Filtering:
    """Return F(n, 3) by Toom and Cook: interpolation at `points` and at infinity.

    The n + 1 points are different, and the first is 1.
    """
    n = len(points) - 1
    others = [[b for b in points if b != a] for a in points]
    inputs = [[*np.poly(roots)[::-1], 0.0] for roots in others] + [list(np.poly(points)[::-1])]
    taps = [[a**k / np.prod([a - b for b in rest]) for k in range(3)] for a, rest in zip(points, others, strict=True)]
    outputs = [[a**k for a in points] + [float(k == n - 1)] for k in range(n)]
    return Filtering(*(np.array(matrix).tolist() for matrix in (inputs, [*taps, [0, 0, 1]], outputs)))


FOUR_FRAMES = _minimal_filtering([1, -1, 0.5, -0.5, 0])
TWO_FRAMES = _minimal_filtering([1, -1, 0])
ONE_FRAME = Filtering(np.eye(3).tolist(), np.eye(3).tolist(), [[1, 1, 1]])
FIRST_FRAME = Filtering([[0, 0, 1]], [[1, 1, 1]], [[1]])  # the frames before it are copies of it


def _division(time: int, repeated: bool) -> Iterator[tuple[Filtering, list[int]]]:
    """Yield filters for a clip of `time` frames, each with the first frames of its pieces."""
    if time % 2:
        yield FIRST_FRAME if repeated else ONE_FRAME, [0]
    if time % 4 >= 2:
        yield TWO_FRAMES, [time % 2]
    if time >= 4:
        yield FOUR_FRAMES, list(range(time % 4, time, 4))


def _combination(coefficients: Sequence[float], frames: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Return the weighted sum of frames, in `out` or a new tensor, or the only frame in it."""
    # A factor of 1 comes first, since it needs no product.
    (c, total), *rest = sorted(
        ((c, f) for c, f in zip(coefficients, frames, strict=True) if c), key=lambda p: p[0] != 1
    )
    fresh = c != 1
    if fresh:
        total = torch.mul(total, c, out=out)
    for c, frame in rest:
        total = total.add_(frame, alpha=c) if fresh else torch.add(total, frame, alpha=c, out=out)
        fresh = True
    return total


def _add_multiples(coefficients: Sequence[float], product: Tensor, frames: Sequence[Tensor]) -> None:
    """Add `product` times a coefficient to each of the frames."""
    for c, frame in zip(coefficients, frames, strict=True):
        if c:
            frame.add_(product, alpha=c)


# ---------------------------------------------------------------- convolution


def _empty_result(x: Tensor, weight: Tensor) -> Tensor:
    return empty_channels_last(x, (x.shape[0], len(weight), *x.shape[2:]))


def _convolve(before: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Write the convolution of `x` into `y`, which may be `x` itself."""
    frames = _with_frames_before(before, x)
    mixed = torch.empty_like(frames[-1])  # reused for all products, since allocation is slower than the sums
    # From the last frames to the first, so that none is overwritten before it has been used.
    for filtering, starts in reversed(list(_division(x.shape[2], before is None))):
        kernels = _kernels(filtering, weight)
        for start in reversed(starts):
            d = frames[start : start + len(filtering.outputs) + 2]
            products = (
                F.conv2d(_combination(row, d, mixed), kernel, None if index else bias, padding=1)
                for index, (row, kernel) in enumerate(zip(filtering.inputs, kernels, strict=True))
            )
            out = y[:, :, start : start + len(filtering.outputs)].unbind(2)
            _write_sums(filtering, iter(list(products)) if y is x else products, out)


def _write_sums(filtering: Filtering, products: Iterator[Tensor], out: Sequence[Tensor]) -> None:
    """Write the output frames from the products."""
    first = next(products)
    for index, product in enumerate(products, 1):
        factors = [row[index] for row in filtering.outputs]
        if index > 1:
            _add_multiples(factors, product, out)
        else:  # with the first product, which every frame contains once
            for c, frame in zip(factors, out, strict=True):
                torch.add(first, product, alpha=c, out=frame)
    if len(filtering.inputs) == 1:
        out[0].copy_(first)


class _CausalConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, before: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(before, x, weight)
        y = _empty_result(x, weight)
        _convolve(before, x, weight, bias, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # The transpose of every step of the forward pass.
        before, x, weight = ctx.saved_tensors
        wants_before, wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        wants_frames = wants_before or wants_x
        d_before = torch.zeros_like(before) if wants_frames and before is not None else None
        d_x = torch.zeros_like(x) if wants_frames else None
        d_frames = _with_frames_before(d_before, d_x) if wants_frames else None
        # Channels-last, as the result of convolution_backward.
        d_taps = weight.new_zeros((3, len(weight), *weight.shape[3:], weight.shape[1])).permute(0, 1, 4, 2, 3)

        frames, d_y = _with_frames_before(before, x), gradient.unbind(2)
        for filtering, starts in _division(x.shape[2], before is None):
            kernels = _kernels(filtering, weight)
            for start in starts:
                window = slice(start, start + len(filtering.outputs) + 2)
                d_out = d_y[start : start + len(filtering.outputs)]
                for index, kernel in enumerate(kernels):
                    mixed = _combination(filtering.inputs[index], frames[window])
                    d_product = _combination([row[index] for row in filtering.outputs], d_out)
                    wanted = [wants_frames, wants_weight, False]
                    d_mixed, d_kernel, _ = torch.ops.aten.convolution_backward(
                        d_product, mixed, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
                    )
                    if d_frames is not None:
                        _add_multiples(filtering.inputs[index], d_mixed, d_frames[window])
                    if wants_weight:
                        _add_multiples(filtering.taps[index], d_kernel, d_taps)
        d_weight = d_taps.movedim(0, 2) if wants_weight else None
        d_bias = gradient.sum((0, 2, 3, 4)) if wants_bias else None
        return d_before, d_x, d_weight, d_bias


def _with_frames_before(before: Tensor | None, x: Tensor) -> list[Tensor]:
    """Return the frames of `x` after the two frames before them.

    Copies of the first frame are the same tensor.
    """
    frames = list(x.unbind(2))
    return [*(frames[:1] * 2 if before is None else before.unbind(2)), *frames]


def _kernels(filtering: Filtering, weight: Tensor) -> list[Tensor]:
    """Return the 2D kernel of each product."""
    taps = weight.movedim(2, 0).contiguous()  # contiguous taps, which conv2d would otherwise copy each time
    return [_combination(row, taps.unbind()) for row in filtering.taps]
