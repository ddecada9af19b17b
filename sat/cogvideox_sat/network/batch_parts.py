"""Run a network on a part of its batch at a time, to save memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def in_parts(network: Callable[..., Tensor], size: int) -> Callable[..., Tensor]:
    """Return a function that runs a network on `size` samples at a time.

    The function returns the outputs as one batch.

    Args:
        network: called as `network(x, t, cond, **inputs)`, with x (batch, ...), t (batch,) and a dictionary of tensors.
            Tensors in `inputs` with as many rows as x are divided, too.
    """

    def run(x: Tensor, t: Tensor, cond: dict[str, Tensor], **inputs: Any) -> Tensor:
        outputs = []
        for first in range(0, len(x), size):
            rows = slice(first, first + size)
            part = {kind: value[rows] for kind, value in cond.items()}
            others = {name: value[rows] if _has_rows(value, len(x)) else value for name, value in inputs.items()}
            outputs.append(network(x[rows], t[rows], part, **others))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    return run


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
