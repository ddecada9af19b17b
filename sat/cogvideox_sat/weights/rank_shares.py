"""Divide the tensors of a network, including adapters, between model-parallel ranks.

A column-parallel layer is divided along its output features, separately for each of its `stride` parts, so that every
rank gets whole heads of q, k and v. A row-parallel layer is divided along its input features; its bias is not divided.
An adapter adds x·Aᵀ·Bᵀ to a layer: for a column-parallel layer, B is divided along output features; for a row-parallel
one, A along input features.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sgm.errors import UserError

ORIGINAL = ".original."  # in the names of a layer's own tensors if it has an adapter; checkpoints may omit it


class Cut(NamedTuple):
    """The way in which a tensor is divided.

    Args:
        dim: the dimension.
        parts: size ratios of the parts of the tensor; each part is divided separately.
    """

    dim: int
    parts: tuple[int, ...] = (1,)

    def share(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """Return the share of one of `size` ranks, as a copy.

        Raises:
            UserError: the tensor cannot be divided evenly.
        """
        count = whole.shape[self.dim]
        if count % (sum(self.parts) * size):
            raise UserError(
                f"model_parallel_size: {size} does not divide a tensor of shape {tuple(whole.shape)}; choose another "
                "number"
            )
        parts = whole.split(self._sizes(count), self.dim)
        return torch.cat([part.chunk(size, self.dim)[rank] for part in parts], self.dim)

    def join(self, shares: Sequence[Tensor]) -> Tensor:
        """Return the whole tensor, given the shares of all ranks: the inverse of `share`."""
        by_rank = [share.split(self._sizes(share.shape[self.dim]), self.dim) for share in shares]
        return torch.cat([part for same in zip(*by_rank, strict=True) for part in same], self.dim)

    def whole_shape(self, share: Sequence[int], size: int) -> torch.Size:
        """Return the shape of the whole tensor, given that of a share and the number of ranks."""
        return torch.Size(length * size if dim == self.dim else length for dim, length in enumerate(share))

    def _sizes(self, count: int) -> list[int]:
        return [count // sum(self.parts) * ratio for ratio in self.parts]


Cuts = Mapping[str, Cut]
"""Maps names of tensors, without `ORIGINAL`, to cuts. Tensors that are not listed are whole on every rank."""

# For the layers of CogVideoX's networks.
_NAMES = (
    (r"attention\.query_key_value\.(weight|bias)", Cut(0, (1, 1, 1))),
    (r"attention\.query_key_value\.matrix_B\.\d+", Cut(0)),
    (r"attention\.dense\.(weight|matrix_A\.\d+)", Cut(1)),
    (r"mlp\.dense_h_to_4h(_gate)?\.(weight|bias)", Cut(0)),
    (r"mlp\.dense_4h_to_h\.weight", Cut(1)),
)
_PATTERNS = tuple((re.compile(rf"(?:.+\.)?transformer\.layers\.\d+\.{ending}"), cut) for ending, cut in _NAMES)


def plain(name: str) -> str:
    """Return the name of a tensor as it is used in `Cuts`."""
    return name.replace(ORIGINAL, ".")


def cuts_by_name(names: Iterable[str]) -> dict[str, Cut]:
    """Return the cuts of a CogVideoX network that follow from the names of its tensors."""
    plain_names = {plain(name) for name in names}
    return {name: cut for name in plain_names for pattern, cut in _PATTERNS if pattern.fullmatch(name)}


def cuts_of(network: nn.Module) -> dict[str, Cut]:
    """Return the cuts of a network, which may be on the meta device."""
    # Imported here, since it takes seconds and 300 MB, and tools for files divide tensors by name.
    from sat.mpu import ColumnParallelLinear, RowParallelLinear

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
    """Check that all shares of a checkpoint hold tensors of the same names.

    Args:
        what: name of the checkpoint, for errors.

    Raises:
        UserError: they do not.
    """
    if any(share.keys() != shares[0].keys() for share in shares):
        raise UserError(
            f"load: {what}: the files of the model-parallel ranks do not hold the same tensors; copy all files of one "
            "iteration there"
        )


def recut(shares: Sequence[Mapping[str, Tensor]], cuts: Cuts, rank: int, size: int, what: str) -> dict[str, Tensor]:
    """Return one rank's share of `size`, given the shares of any number of ranks.

    Only one tensor at a time is joined.

    Args:
        shares: weights of each of the former ranks.
        what: name of the checkpoint, for errors.

    Raises:
        UserError: the shares do not hold the same tensors, or `size` does not divide them.
    """
    check_alike(shares, what)
    weights = {}
    for name, first in shares[0].items():
        cut = cuts.get(plain(name))
        weights[name] = first if cut is None else recut_tensor([share[name] for share in shares], cut, rank, size)
    return weights


def recut_tensor(shares: Sequence[Tensor], cut: Cut, rank: int, size: int) -> Tensor:
    """Return one rank's share of a tensor, given the shares of any number of ranks.

    Raises:
        UserError: `size` does not divide the tensor.
    """
    whole = shares[0] if len(shares) == 1 else cut.join(shares)
    return whole if size == 1 else cut.share(whole, rank, size)
