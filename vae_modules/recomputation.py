"""Activation checkpointing: recompute a layer's activations in the backward pass.

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
    """Return layer(x, chunk, *others).

    With `recompute`, only these arguments are kept for the backward pass, with the frames that convolutions received
    from another chunk or rank, and the sums of norms: recomputing needs no communication.
    """
    if not (recompute and torch.is_grad_enabled()):
        return layer(x, chunk, *others)
    chunk = RepeatableChunk(chunk)

    def run(x: Tensor, *others: Any) -> Tensor:
        chunk.rewind()
        return layer(x, chunk, *others)

    return checkpoint(run, x, *others, use_reentrant=False)


def check_levels(levels: Sequence[int], count: int) -> frozenset[int]:
    """Return the option `checkpoint_levels` of a network of `count` levels as a set.

    Raises:
        UserError: the option has a value that is not a level.
    """
    for level in levels:
        if type(level) is not int or not 0 <= level < count:
            raise UserError(f"checkpoint_levels: {level!r} is not a level of ch_mult; use 0 to {count - 1}")
    return frozenset(levels)
