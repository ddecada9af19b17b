"""Exponential moving averages of weights, for modules and for optimizers."""

from collections.abc import Sequence

import torch
from torch import Tensor


def kept_share(decay: float, step: int | Tensor, warm_up: bool = True) -> float | Tensor:
    """Return the share of a moving average that its update `step`, from 1, keeps.

    The share is min(decay, (1 + step)/(10 + step)), so that the average soon forgets the initial weights, or `decay`
    without the warm-up.

    Args:
        step: a number; or a tensor, for which the share is a float64 tensor on its device, so that nothing waits for
            it.
    """
    if not isinstance(step, Tensor):
        return min(decay, (1 + step) / (10 + step)) if warm_up else decay
    share = (1 + step) / (10 + step).double()
    return share.clamp(max=decay) if warm_up else torch.full_like(share, decay)


@torch.no_grad()
def follow(averages: Sequence[Tensor], weights: Sequence[Tensor], kept: float | Tensor) -> None:
    """Update averages in place to kept * average + (1 - kept) * weight, without copies.

    Args:
        averages: each has the shape and dtype of the tensor of `weights` at the same index.
        kept: a value of `kept_share`.
    """
    if not isinstance(kept, Tensor):
        torch._foreach_lerp_(averages, weights, 1 - kept)
        return
    weight = {dtype: (1 - kept).to(dtype) for dtype in {average.dtype for average in averages}}
    torch._foreach_lerp_(averages, weights, [weight[average.dtype] for average in averages])
