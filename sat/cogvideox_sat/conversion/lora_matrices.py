"""The matrices of a LoRA adapter and their strengths, whichever file they are from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cogvideox_sat.conversion.lora_names import MatrixKey, Projection
from sgm.errors import UserError


@dataclass(frozen=True)
class Adapter:
    """Matrices A (rank, width) and B (width, rank) of all adapted projections, of one rank.

    Attributes:
        source: the file of the adapter.
        scales: for each projection, the factor alpha/rank of its B·A.
    """

    source: Path
    rank: int
    width: int
    matrices: dict[MatrixKey, Tensor]
    scales: dict[Projection, float]

    @property
    def layers(self) -> list[int]:
        """Return the numbers of the adapted layers, ascending."""
        return sorted({projection.layer for projection in self.scales})

    def with_alpha(self, alpha: float) -> "Adapter":
        """Return the same adapter for a configuration with this alpha, scaling B accordingly.

        Raises:
            UserError: B's dtype cannot hold the scaled values.
        """
        scale, matrices = alpha / self.rank, dict(self.matrices)
        for key, tensor in self.matrices.items():
            factor = self.scales[key.projection] / scale
            if key.matrix == "B" and not math.isclose(factor, 1.0, rel_tol=1e-12):
                wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
                matrices[key] = (wide * factor).to(tensor.dtype)
                if not matrices[key].isfinite().all():
                    raise UserError(
                        f"{self.source}: {key.projection} times {factor:g} is out of the range of {tensor.dtype}; "
                        "choose a larger --lora_alpha"
                    )
        return Adapter(self.source, self.rank, self.width, matrices, dict.fromkeys(self.scales, scale))


def check_matrices(source: Path, matrices: Mapping[MatrixKey, Tensor]) -> tuple[int, int]:
    """Return the rank and the width of an adapter, after checking its matrices.

    Args:
        matrices: A (rank, width) and B (width, rank), of any floating-point dtype.

    Raises:
        UserError: a projection has only one of A and B, a matrix is empty, or ranks or widths differ.
    """
    for key in matrices:
        other = MatrixKey(key.projection, "B" if key.matrix == "A" else "A")
        if other not in matrices:
            raise UserError(
                f"{source}: {key.projection} has a matrix {key.matrix} but no matrix {other.matrix}; copy the whole "
                "adapter"
            )
    ranks: dict[int, Projection] = {}
    widths: dict[int, Projection] = {}
    for key, tensor in sorted(matrices.items()):
        if tensor.ndim != 2 or not tensor.is_floating_point() or not tensor.numel():
            raise UserError(
                f"{source}: {key.projection}: matrix {key.matrix} is {tensor.dtype} {list(tensor.shape)}; expected "
                f"floating-point numbers {'(rank, width)' if key.matrix == 'A' else '(width, rank)'}"
            )
        rank, width = tensor.shape if key.matrix == "A" else reversed(tensor.shape)
        ranks.setdefault(rank, key.projection)
        widths.setdefault(width, key.projection)
    for values, what in ((ranks, "rank"), (widths, "width")):
        if len(values) != 1:
            found = ", ".join(f"{value} ({projection})" for value, projection in list(values.items())[:3])
            raise UserError(f"{source}: the {what} differs between layers: {found}; an adapter here has one {what}")
    return next(iter(ranks)), next(iter(widths))
