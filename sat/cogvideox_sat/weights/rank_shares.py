"""How model-parallel ranks share the tensors of a network, those of adapters too.

A column-parallel layer is cut along its output features, each of its `stride` parts apart, so that every rank gets
whole heads of q, k and v; a row-parallel one along its input features, and its bias not. An adapter adds x·Aᵀ·Bᵀ to a
layer: on a column-parallel one B is cut along output features, on a row-parallel one A along input features.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from sat.mpu import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from sgm.errors import UserError

ORIGINAL = ".original."  # a layer with an adapter calls its own tensors so, which a checkpoint need not


class Cut(NamedTuple):
    """Where a tensor is cut.

    Args:
        dim: the dimension.
        parts: it consists of parts, whose sizes have these ratios; each of them is shared out by itself.
    """

    dim: int
    parts: tuple[int, ...] = (1,)

    def share(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """Return what one of `size` ranks has of a tensor, in memory of its own.

        Raises:
            UserError: the tensor cannot be shared out evenly.
        """
        count = whole.shape[self.dim]
        if count % (sum(self.parts) * size):
            raise UserError(f"model_parallel_size: {size} does not divide a tensor of the shape {tuple(whole.shape)}")
        parts = whole.split(self._sizes(count), self.dim)
        return torch.cat([part.chunk(size, self.dim)[rank] for part in parts], self.dim)

    def join(self, shares: Sequence[Tensor]) -> Tensor:
        """Return the tensor that the ranks have these shares of: what undoes `share`."""
        by_rank = [share.split(self._sizes(share.shape[self.dim]), self.dim) for share in shares]
        return torch.cat([part for same in zip(*by_rank, strict=True) for part in same], self.dim)

    def whole_shape(self, share: Sequence[int], size: int) -> torch.Size:
        """Return the shape of the tensor that each of `size` ranks has a share of this shape of."""
        return torch.Size(length * size if dim == self.dim else length for dim, length in enumerate(share))

    def _sizes(self, count: int) -> list[int]:
        return [count // sum(self.parts) * ratio for ratio in self.parts]


Cuts = Mapping[str, Cut]
"""By the name of a tensor, without `ORIGINAL`; the others are whole on every rank."""

# Of the layers that CogVideoX's networks consist of.
_NAMES = (
    (r"attention\.query_key_value\.(weight|bias)", Cut(0, (1, 1, 1))),
    (r"attention\.query_key_value\.matrix_B\.\d+", Cut(0)),
    (r"attention\.dense\.(weight|matrix_A\.\d+)", Cut(1)),
    (r"mlp\.dense_h_to_4h(_gate)?\.(weight|bias)", Cut(0)),
    (r"mlp\.dense_4h_to_h\.weight", Cut(1)),
)
_PATTERNS = tuple((re.compile(rf"(?:.+\.)?transformer\.layers\.\d+\.{ending}"), cut) for ending, cut in _NAMES)


def plain(name: str) -> str:
    """Return the name of a tensor as `Cuts` have it."""
    return name.replace(ORIGINAL, ".")


def cuts_by_name(names: Iterable[str]) -> dict[str, Cut]:
    """Return where the tensors of a CogVideoX network are cut that are known by their names alone."""
    plain_names = {plain(name) for name in names}
    return {name: cut for name in plain_names for pattern, cut in _PATTERNS if pattern.fullmatch(name)}


def cuts_of(network: nn.Module) -> dict[str, Cut]:
    """Return where the tensors of a network are cut, which may be on the meta device."""
    cuts: dict[str, Cut] = {}
    for prefix, module in network.named_modules():
        start = f"{prefix}." if prefix else ""
        layer = module.original if hasattr(module, "matrix_A") else module
        if isinstance(layer, ColumnParallelLinear):
            ratios = (1,) * layer.stride if isinstance(layer.stride, int) else tuple(layer.stride)
            cuts |= {plain(f"{start}{name}"): Cut(0, ratios) for name in ("weight", "bias")}
            if layer is not module:
                cuts |= {f"{start}matrix_B.{number}": Cut(0) for number in range(len(module.matrix_B))}
        elif isinstance(layer, RowParallelLinear):
            cuts[plain(f"{start}weight")] = Cut(1)
            if layer is not module:
                cuts |= {f"{start}matrix_A.{number}": Cut(1) for number in range(len(module.matrix_A))}
    return cuts


def check_alike(shares: Sequence[Mapping[str, object]], what: str) -> None:
    """Check that all shares of a checkpoint hold tensors of the same names; else raise UserError.

    Args:
        what: they are of.
    """
    if any(share.keys() != shares[0].keys() for share in shares):
        raise UserError(f"load: {what}: the files of its model-parallel ranks do not hold the same tensors")


def recut(shares: Sequence[Mapping[str, Tensor]], cuts: Cuts, rank: int, size: int, what: str) -> dict[str, Tensor]:
    """Return what one of `size` ranks has of weights that any number of ranks share; one tensor at a time is whole.

    Args:
        shares: of each of these ranks.
        what: they are of, for errors.

    Raises:
        UserError: they do not hold the same tensors, or `size` does not divide them.
    """
    check_alike(shares, what)
    weights = {}
    for name, first in shares[0].items():
        cut = cuts.get(plain(name))
        weights[name] = first if cut is None else recut_tensor([share[name] for share in shares], cut, rank, size)
    return weights


def recut_tensor(shares: Sequence[Tensor], cut: Cut, rank: int, size: int) -> Tensor:
    """Return what one of `size` ranks has of a tensor that any number of ranks share."""
    whole = shares[0] if len(shares) == 1 else cut.join(shares)
    return whole if size == 1 else cut.share(whole, rank, size)
