"""Try the GPU kernels on small tensors, before they are used."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vae_modules.passes import gpu_kernels as kernels
from vae_modules.passes.latent_maps import LatentMaps


def try_out(dtype: torch.dtype, device: str = "cuda") -> None:
    """Check that the kernels agree with PyTorch.

    Raises:
        ArithmeticError: the results differ.
    """
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for found, exact in _results(dtype, device):
        if not (found.double() - exact).norm() <= tolerance * exact.norm():
            raise ArithmeticError("they give other numbers than PyTorch")


def _results(dtype: torch.dtype, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the results of the kernels, and those of PyTorch in float64."""
    own = torch.Generator(device).manual_seed(0)  # the global generators stay untouched

    def drawn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=own, device=device).to(dtype)

    def empty(*shape: int) -> Tensor:
        shape = (2, 48, *shape)
        return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last_3d)

    x, other = (drawn(2, 3, 6, 5, 48).permute(0, 4, 1, 2, 3) for _ in range(2))
    offset, out = drawn(48), empty(3, 6, 5)
    wide, more, added = x.double(), other.double(), offset.double()[:, None, None, None]

    scale, shift = (drawn(2, 48, 2, 3, 5, dtype=torch.float32) for _ in range(2))
    kernels.write_modulated_silu(out, x, scale, shift, True)
    yield out, F.silu(wide * _resized(scale) + _resized(shift))

    scale, shift = scale[:, :, :, :1, :1], shift[:, :, :, :1, :1]
    maps, tail = LatentMaps(drawn(2, 5, 2, 3, 5), *(drawn(48, *more) for more in ((5,), (), (5,), ()))), empty(2, 6, 5)
    kernels.write_modulated_silu(out, x[:, :, :2], scale, shift, True, maps, tail)
    outer, inner = LatentMaps(*(each.double() for each in maps)).scale_and_shift()
    normed = _twice(wide[:, :, :2]) * _twice(scale) + _twice(shift)
    exact = F.silu(normed * _resized(outer) + _resized(inner))
    yield from ((out, exact), (tail, exact[:, :, -2:]), (kernels.channel_sums(x), _sums(wide)))

    total = wide + more + added
    halved, doubled = empty(2, 7, 6), empty(3, 12, 10)
    kernels.write_halved_sum(halved, x, other, offset, True, True)
    kernels.write_doubled_sum(doubled, x, other, offset)
    pairs = torch.cat([total[:, :, :1], total[:, :, 1:2].lerp(total[:, :, 2:], 0.5)], dim=2)
    yield from ((halved, F.pad(pairs, (0, 1, 0, 1))), (doubled, total.repeat_interleave(2, 3).repeat_interleave(2, 4)))

    out.copy_(x)
    yield kernels.add_and_sum(out, other[:, :, :2], offset, True), _sums(exact := wide + _twice(more[:, :, :2]) + added)
    yield out, exact

    for window, channels in (((1, 1, 1), 48), ((3, 3, 3), 4)):
        x = drawn(2, 3, 6, 5, channels).permute(0, 4, 1, 2, 3)
        weight = drawn(48, channels, *window) / 4
        exact = F.conv3d(x.double(), weight.double())
        out, (factor, summand) = empty(*exact.shape[2:]), drawn(2, 2, 48, 1, 1, 1, dtype=torch.float32)
        kernels.write_product_silu(out, x, weight, factor, summand)
        yield from ((kernels.product_sums(x, weight), _sums(exact)), (out, F.silu(exact * factor + summand)))
        exact = out.double() + exact + added
        yield kernels.add_product_and_sum(out, x, weight, offset), _sums(exact)
        yield out, exact


def _sums(x: Tensor) -> Tensor:
    return torch.stack([x.sum((2, 3, 4)), x.square().sum((2, 3, 4))])


def _twice(x: Tensor) -> Tensor:
    """Return the two frames of `x`, the last of them twice."""
    return torch.cat([x, x[:, :, 1:]], dim=2)


def _resized(maps: Tensor) -> Tensor:
    """Return maps of two frames of 3x5 for three of 6x5."""
    return _twice(maps).double().repeat_interleave(2, dim=3)
