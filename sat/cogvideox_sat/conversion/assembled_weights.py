"""Make tensors under other names out of the pieces of stored ones."""

import logging
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from cogvideox_sat.conversion.stored_weights import Stored, StoredWeights, widest_dtype
from cogvideox_sat.weights.diffusers_names import Pieces, assembled_shape, rows_of

logger = logging.getLogger(__name__)


def assembled(pieces: Mapping[str, Pieces], weights: StoredWeights) -> StoredWeights:
    """Return the tensors that pieces of `weights` make, each in its pieces' widest dtype.

    Args:
        pieces: for each new name, the pieces of its tensor.
    """
    shapes = weights.shapes
    entries = {}
    for name, parts in pieces.items():
        shape = torch.Size(assembled_shape(parts, shapes))
        dtype = widest_dtype(weights.entries[piece.name].dtype for piece in parts)
        entries[name] = Stored(shape, dtype, partial(_joined, parts, weights, dtype))
    return StoredWeights(entries)


def _joined(parts: Pieces, weights: StoredWeights, dtype: torch.dtype) -> Tensor:
    rows = rows_of(parts, weights)
    return rows[0] if len(rows) == 1 else torch.cat([part.to(dtype) for part in rows])


def log_pieces(pieces: Mapping[str, Pieces], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Log how each tensor is made, and its shape.

    Args:
        pieces: for each new name, the pieces of its tensor.
        shapes: the shapes of the stored tensors.
    """
    for name, parts in pieces.items():
        logger.info("%s %s <- %s", name, list(assembled_shape(parts, shapes)), ", ".join(map(str, parts)))
