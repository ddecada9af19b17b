"""Exponential moving averages of weights, wherever they are kept: beside a model, or by an optimizer."""

from collections.abc import Sequence

import torch
from torch import Tensor


def kept_share(decay: float, step: int | Tensor, warm_up: bool = True) -> float | Tensor:
    """Return the share of a moving average that its update `step`, from 1, keeps: min(decay, (1 + step)/(10 + step)).

    By this warm-up the average soon forgets the weights that it starts from; without it the share is `decay`.

    Args:
        step: with a tensor, the share is one too, on its device and in float64: nothing waits for the device.
    """
    if not isinstance(step, Tensor):
        return min(decay, (1 + step) / (10 + step)) if warm_up else decay
    share = (1 + step) / (10 + step).double()
    return share.clamp(max=decay) if warm_up else torch.full_like(share, decay)


@torch.no_grad()
def follow(averages: Sequence[Tensor], weights: Sequence[Tensor], kept: float | Tensor) -> None:
    """Update averages in place: each becomes kept * average + (1 - kept) * weight, without temporary copies.

    Args:
        averages: each of the shape and dtype of the tensor of `weights` at its place.
        kept: what `kept_share` gives.
    """
    if not isinstance(kept, Tensor):
        torch._foreach_lerp_(averages, weights, 1 - kept)
        return
    weight = {dtype: (1 - kept).to(dtype) for dtype in {average.dtype for average in averages}}
    torch._foreach_lerp_(averages, weights, [weight[average.dtype] for average in averages])
