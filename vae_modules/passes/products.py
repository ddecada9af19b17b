"""Convolutions whose result is not written, but added, summed or normalized at once.

No gradients are taken. This saves passes where the result is large and a value of it is cheap: a 1x1x1 convolution, or
one of few channels. Tensors are (batch, channel, time, height, width) in channels-last memory. Each pass is one
operator, on a GPU one kernel (see `gpu_kernels`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sgm.modules.autoencoding import meta_device
from vae_modules.passes.channel_sums import add_in_place, channel_sums
from vae_modules.passes.gpu_support import kernels_for
from vae_modules.passes.modulation import write_modulated_silu


@dataclass
class Product:
    """The result of a convolution without padding, stride and bias.

    Attributes:
        source: the input.
        weight: (out_channels, in_channels, time, height, width).
    """

    source: Tensor
    weight: Tensor

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the result."""
        sizes = (size - window + 1 for size, window in zip(self.source.shape[2:], self.weight.shape[2:], strict=True))
        return torch.Size((len(self.source), len(self.weight), *sizes))

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def device(self) -> torch.device:
        return self.source.device

    def split(self, lengths: Sequence[int]) -> "list[Product]":
        """Return parts of `lengths` frames; several only of a convolution of length 1 in time."""
        if len(lengths) == 1:
            return [self]
        assert self.weight.shape[2] == 1
        return [Product(source, self.weight) for source in self.source.split(list(lengths), dim=2)]

    def written(self) -> Tensor:
        """Return the result as a tensor."""
        return F.conv3d(self.source, self.weight)

    def sums(self) -> Tensor:
        """Return the `channel_sums` of the result."""
        return _product_sums(self.source, self.weight)

    def add_to(self, x: Tensor, offset: Tensor | None) -> Tensor:
        """Add the result and an offset (channel,) to `x`, and return the `channel_sums` of that."""
        return _add_product_and_sum(x, self.source, self.weight, offset)

    def write_modulated_silu(self, out: Tensor, scale: Tensor, shift: Tensor) -> None:
        """Write silu(result * scale + shift) into `out`, with (batch, channel, 1, 1, 1) maps."""
        _product_silu(out, self.source, self.weight, scale, shift)


def written(x: Tensor | Product) -> Tensor:
    """Return `x` as a tensor."""
    return x.written() if isinstance(x, Product) else x


def stay_unwritten(x: Tensor, weight: Tensor) -> bool:
    """Return whether a `Product` is faster than its tensor: where the GPU kernels work.

    Tensors without content are as on the device that they stand for.
    """
    if x.dtype != weight.dtype or torch.compiler.is_compiling():
        return False
    on_meta = x.device.type == "meta"
    if not on_meta and torch.is_autocast_enabled(x.device.type):
        return False
    if on_meta or isinstance(x, FakeTensor):
        return meta_device.type_of(x) != "cpu"
    return kernels_for(x) is not None


# ---------------------------------------------------------------- operators


@torch.library.custom_op("cogvideox_vae::product_sums", mutates_args=())
def _product_sums(source: Tensor, weight: Tensor) -> Tensor:
    if kernels := kernels_for(source):
        return kernels.product_sums(source, weight)
    return channel_sums(F.conv3d(source, weight))


@torch.library.custom_op("cogvideox_vae::add_product_and_sum", mutates_args=("x",))
def _add_product_and_sum(x: Tensor, source: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
    if kernels := kernels_for(x, source):
        return kernels.add_product_and_sum(x, source, weight, offset)
    return add_in_place(x, F.conv3d(source, weight), offset)


@torch.library.custom_op("cogvideox_vae::product_silu", mutates_args=("out",))
def _product_silu(out: Tensor, source: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> None:
    if kernels := kernels_for(out, source):
        kernels.write_product_silu(out, source, weight, scale, shift)
    else:
        write_modulated_silu(out, F.conv3d(source, weight), scale, shift, False)


@_product_sums.register_fake
def _(source: Tensor, weight: Tensor) -> Tensor:
    return source.new_empty((2, len(source), len(weight)), dtype=torch.float64)


@_add_product_and_sum.register_fake
def _(x: Tensor, source: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
    return x.new_empty((2, *x.shape[:2]), dtype=torch.float64)


@_product_silu.register_fake
def _(out: Tensor, source: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> None:
    return None
