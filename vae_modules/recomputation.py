"""Activation checkpointing: a layer's activations are recomputed in the backward pass rather than kept for it.

Chen et al., "Training Deep Nets with Sublinear Memory Cost".
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sgm.errors import UserError
from sgm.modules.autoencoding.clip import Chunk, RepeatableChunk


def run_layer(layer: nn.Module, x: Tensor, chunk: Chunk, *others: Any, recompute: bool) -> Tensor:
    """layer(x, chunk, *others). With `recompute`, all that is kept for the backward pass are these arguments, the
    frames that convolutions got from another chunk or rank, and the sums of norms: to recompute takes no communication.
    """
    if not (recompute and torch.is_grad_enabled()):
        return layer(x, chunk, *others)
    chunk = RepeatableChunk(chunk)

    def run(x: Tensor, *others: Any) -> Tensor:
        chunk.rewind()
        return layer(x, chunk, *others)

    return checkpoint(run, x, *others, use_reentrant=False)


def check_levels(levels: Sequence[int], count: int) -> frozenset[int]:
    """The option `checkpoint_levels` of a network of `count` levels.

    Raises:
        UserError: it names something that is no level.
    """
    for level in levels:
        if type(level) is not int or not 0 <= level < count:
            raise UserError(f"checkpoint_levels: {level!r} is none of the levels of ch_mult, 0 to {count - 1}")
    return frozenset(levels)
