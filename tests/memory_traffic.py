"""Counts what goes to and from memory beside convolutions, on tensors that have shapes and no content."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ONLY_WRITE = ("aten::copy_", "aten::zero_", "aten::fill_", "cogvideox_vae::modulated_silu")
PRODUCTS = ("aten::addmm", "aten::mm")  # of matrices: pointwise convolutions
MAKE_NOTHING = ("aten::empty", "aten::new_empty", "prim::")


class MemoryTraffic(TorchDispatchMode):
    """Sums up the bytes that each operation within the block reads and writes, by its name: `bytes`.

    Convolutions, also as products of matrices, views and what only reserves memory are left out. But a convolution that
    is no such product and has a bias counts as one that reads its result and writes it once more: so PyTorch adds the
    bias on a GPU, after cuDNN. A tensor that is changed in place counts as read and as written, unless the operation
    does not look at what it overwrites.
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
            results = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
            fresh = [each for each in results if not any(each is other for other in written)]
            read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            if (name.startswith(ONLY_WRITE) and not name.endswith("modulated_silu_")) or "out" in kwargs:
                read = [each for each in read if not any(each is other for other in written)]
            self.bytes[name] += sum(map(_bytes, [*read, *written, *fresh]))
        return result


def traffic_of(run: Callable[[], object]) -> MemoryTraffic:
    """Return what a call without gradients makes go to and from memory."""
    with torch.no_grad(), MemoryTraffic() as traffic:
        run()
    return traffic


def _written(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (each for each in tree_leaves(value) if isinstance(each, Tensor))


def _bytes(x: Tensor) -> int:
    """Of what is in memory: a value that is repeated by a stride of 0 counts once."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return math.prod(sizes) * x.element_size()
