"""Make tensors under other names out of the pieces of stored ones."""

import logging
from collections.abc import Mapping
from functools import partial, reduce

import torch

from cogvideox_sat.conversion.stored_weights import Stored, StoredWeights
from cogvideox_sat.weights.diffusers_names import Pieces, assemble, assembled_shape

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
        dtype = reduce(torch.promote_types, (weights.entries[piece.name].dtype for piece in parts))
        entries[name] = Stored(shape, dtype, partial(assemble, parts, weights))
    return StoredWeights(entries)


def log_pieces(pieces: Mapping[str, Pieces], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Log how each tensor is made, and its shape.

    Args:
        pieces: for each new name, the pieces of its tensor.
        shapes: the shapes of the stored tensors.
    """
    for name, parts in pieces.items():
        logger.info("%s %s <- %s", name, list(assembled_shape(parts, shapes)), ", ".join(map(str, parts)))
