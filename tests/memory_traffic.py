"""Count memory traffic besides convolutions, on tensors without content."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ONLY_WRITE = ("aten::copy_", "aten::zero_", "aten::fill_", "cogvideox_vae::modulated_silu")
PRODUCTS = ("aten::addmm", "aten::mm")  # matrix products, which are pointwise convolutions
UNWRITTEN = "cogvideox_vae::product_"  # operators of `products` that do not write a convolution's result
ADDED = "cogvideox_vae::add_product_"  # adds it to a tensor
MAKE_NOTHING = ("aten::empty", "aten::new_empty", "prim::")


class MemoryTraffic(TorchDispatchMode):
    """Sums the bytes that operations within the block read and write, by name: `bytes`.

    Convolutions, also as matrix products, views and allocations are left out. A convolution with a bias, unless it is a
    matrix product, counts as reading and writing its result once more, since PyTorch adds the bias on a GPU after
    cuDNN. An operator of `passes.products` counts as what it does besides a convolution: reading the tensor that it
    adds to, or writing a normalized one. A tensor that is changed in place counts as read and written, unless the
    operation ignores its content.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.name().removesuffix(".out")
        if name == "aten::convolution" and args[2] is not None:
            self.bytes["bias of a convolution"] += 2 * _bytes(result)
        if not (function.is_view or "convolution" in name or name in PRODUCTS or name.startswith(MAKE_NOTHING)):
            written = list(_written(function, args, kwargs))
            if name.startswith((UNWRITTEN, ADDED)):
                self.bytes[name] += sum(map(_bytes, written))
                return result
            results = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
            fresh = [each for each in results if not any(each is other for other in written)]
            read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            if (name.startswith(ONLY_WRITE) and not name.endswith("modulated_silu_")) or "out" in kwargs:
                read = [each for each in read if not any(each is other for other in written)]
            self.bytes[name] += sum(map(_bytes, [*read, *written, *fresh]))
        return result


def traffic_of(run: Callable[[], object]) -> MemoryTraffic:
    """Return the memory traffic of a call without gradients."""
    with torch.no_grad(), MemoryTraffic() as traffic:
        run()
    return traffic


def _written(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (each for each in tree_leaves(value) if isinstance(each, Tensor))


def _bytes(x: Tensor) -> int:
    """Return the bytes in memory; a value repeated by a stride of 0 counts once."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return math.prod(sizes) * x.element_size()
