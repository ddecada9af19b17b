"""Causal 3x3x3 convolution with about half of the products, for float32 on a CPU.

The convolution has a backward pass. Winograd's minimal filtering F(n, 3) along time (Lavin & Gray, "Fast Algorithms for
Convolutional Neural Networks", section 4.1): n output frames of a three-tap filter take n + 2 products of frames, here
2D convolutions, instead of 3n. On a GPU and in half precision a plain 3D convolution is faster, or more exact.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sgm.modules.autoencoding import meta_device
from vae_modules.passes.pieces_in_cache import empty_channels_last
from vae_modules.passes.products import Product


def serves(x: Tensor | Product, weight: Tensor, frames: int | None = None) -> bool:
    """Return whether `causal_conv3d` supports `frames` like those of `x`, and is faster.

    `frames` None: those of `x`.
    """
    applies = (
        meta_device.type_of(x) == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.shape[2:] == (3, 3, 3)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
    # The method adds frames and makes six kernels of three; for small layers this costs more than it saves.
    cached, places = weight.numel() < 2**20, math.prod((x.shape[0], frames or x.shape[2], *x.shape[3:]))
    return applies and min(weight.shape[:2]) >= 16 and (cached or places >= 576)


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

    outputs @ B @ ((taps @ g) * (B @ inputs @ d)), where B replaces each of the first `pairs` pairs of values by their
    sum and difference. In outputs @ B the factors of the first product are 1. Matrices are lists of rows of floats.
    """

    inputs: list[list[float]]
    taps: list[list[float]]
    outputs: list[list[float]]
    pairs: int = 0


def _minimal_filtering(points: Sequence[float], pairs: int = 0) -> Filtering:
    """Return F(n, 3) by Toom and Cook: interpolation at `points` and at infinity.

    The n + 1 points are different, and the first is 1. The first `pairs` pairs are a and -a: the sums for their
    products have even and odd parts in common. These need n >= 4: for less, a part is a single frame of the caller's,
    which would be overwritten.
    """
    n = len(points) - 1
    others = [[b for b in points if b != a] for a in points]
    inputs = [[*np.poly(roots)[::-1], 0.0] for roots in others] + [list(np.poly(points)[::-1])]
    taps = [[a**k / np.prod([a - b for b in rest]) for k in range(3)] for a, rest in zip(points, others, strict=True)]
    outputs = [[a**k for a in points] + [float(k == n - 1)] for k in range(n)]
    halves = np.eye(n + 2)  # the inverse of B
    for first in range(0, 2 * pairs, 2):
        halves[first : first + 2, first : first + 2] = [[0.5, 0.5], [0.5, -0.5]]
    of_taps = np.array([*taps, [0, 0, 1]])
    return Filtering((halves @ inputs).tolist(), of_taps.tolist(), (np.array(outputs) @ halves).tolist(), pairs)


FOUR_FRAMES = _minimal_filtering([1, -1, 0.5, -0.5, 0], pairs=2)
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


def _sums_and_differences(values: Iterable[Tensor], pairs: int) -> Iterator[Tensor]:
    """Yield values; each of the first `pairs` pairs is overwritten by its sum and difference."""
    values = iter(values)
    for _ in range(pairs):
        a, b = next(values), next(values)
        a.add_(b)
        torch.add(a, b, alpha=-2, out=b)
        yield a
        yield b
    yield from values


Room = tuple[Tensor, Tensor]
"""Memory for two frames, used again and again.

To allocate each frame would be slower than the sums."""


def _mixed(matrix: Sequence[Sequence[float]], pairs: int, frames: Sequence[Tensor], room: Room) -> Iterator[Tensor]:
    """Yield B @ matrix @ frames: one of the frames, or in `room` until that is overwritten."""
    sums = (_combination(row, frames, room[index % 2]) for index, row in enumerate(matrix))
    return _sums_and_differences(sums, pairs)


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
    frames, taps, room = _with_frames_before(before, x), _taps(weight), _room(x)
    # From the last frames to the first, so that none is overwritten before it has been used.
    for filtering, starts in reversed(list(_division(x.shape[2], before is None))):
        kernels = _kernels(filtering, taps)
        for start in reversed(starts):
            end = start + len(filtering.outputs)
            mixed = _mixed(filtering.inputs, filtering.pairs, frames[start : end + 2], room)
            products = (
                F.conv2d(frame, kernel, None if index else bias, padding=1)
                for index, (frame, kernel) in enumerate(zip(mixed, kernels, strict=True))
            )
            _write_outputs(filtering, products, y[:, :, start:end].unbind(2))


def _write_outputs(filtering: Filtering, products: Iterator[Tensor], outputs: Sequence[Tensor]) -> None:
    """Write the output frames from the products, after the last product has been taken."""
    terms = list(_sums_and_differences(products, filtering.pairs))
    for row, out in zip(filtering.outputs, outputs, strict=True):
        total = _combination(row, terms, out)
        if total is not out:
            out.copy_(total)


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

        frames, taps, d_y = _with_frames_before(before, x), _taps(weight), gradient.unbind(2)
        room, d_room, wanted = _room(x), _room(gradient), (wants_frames, wants_weight, False)
        for filtering, starts in _division(x.shape[2], before is None):
            kernels, pairs = _kernels(filtering, taps), filtering.pairs
            for start in starts:
                end = start + len(filtering.outputs)
                mixed = _mixed(filtering.inputs, pairs, frames[start : end + 2], room)
                d_products = _mixed(list(zip(*filtering.outputs, strict=True)), pairs, d_y[start:end], d_room)
                triples = zip(d_products, mixed, kernels, strict=True)
                d_mixed = _products_backward(triples, filtering, wanted, d_taps)
                if d_frames is None:
                    deque(d_mixed, maxlen=0)
                    continue
                for row, d_frame in zip(filtering.inputs, _sums_and_differences(d_mixed, pairs), strict=True):
                    _add_multiples(row, d_frame, d_frames[start : end + 2])
        d_weight = d_taps.movedim(0, 2) if wants_weight else None
        d_bias = gradient.sum((0, 2, 3, 4)) if wants_bias else None
        return d_before, d_x, d_weight, d_bias


def _products_backward(
    triples: Iterable[tuple[Tensor, Tensor, Tensor]],
    filtering: Filtering,
    wanted: tuple[bool, bool, bool],
    d_taps: Tensor,
) -> Iterator[Tensor]:
    """Yield the gradients of the frames of the products; those of kernels go to `d_taps`.

    Args:
        triples: for each product its gradient, frame and kernel.
        wanted: gradients of frame, kernel and bias.
    """
    for (d_product, frame, kernel), factors in zip(triples, filtering.taps, strict=True):
        d_frame, d_kernel, _ = torch.ops.aten.convolution_backward(
            d_product, frame, kernel, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
        )
        if wanted[1]:
            _add_multiples(factors, d_kernel, d_taps)
        yield d_frame


def _with_frames_before(before: Tensor | None, x: Tensor) -> list[Tensor]:
    """Return the frames of `x` after the two frames before them.

    Copies of the first frame are the same tensor.
    """
    frames = list(x.unbind(2))
    return [*(frames[:1] * 2 if before is None else before.unbind(2)), *frames]


def _room(x: Tensor) -> Room:
    """Return memory for two frames like those of `x`."""
    return torch.empty_like(x[:, :, 0]), torch.empty_like(x[:, :, 0])


def _taps(weight: Tensor) -> list[Tensor]:
    """Return a channels-last 2D kernel of each tap; conv2d would copy others each time."""
    return [tap.contiguous(memory_format=torch.channels_last) for tap in weight.unbind(2)]


def _kernels(filtering: Filtering, taps: list[Tensor]) -> list[Tensor]:
    """Return the 2D kernel of each product."""
    return [_combination(row, taps) for row in filtering.taps]
