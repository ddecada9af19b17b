"""Elementwise operations on tokens, which overwrite their inputs where that is possible.

It is possible in sampling, which needs no gradients: large temporaries are then written once, and the numbers are the
same.
Shapes: b batch, n tokens (text first), v of them of the video, d width.
"""

import torch
from torch import Tensor


def may_overwrite() -> bool:
    """Return whether temporaries may be reused.

    They may not if gradients need them, or while compiling, because a compiler reuses memory better without this.
    """
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x·(1 + scale) + shift, for x (b, n, d) and shift, scale (b, 1, d).

    x is overwritten if possible.
    """
    return torch.addcmul(shift, x, 1 + scale, out=x if may_overwrite() else None)


def add_gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Return x + gate·update, for x and update (b, n, d) and gate (b, 1, d).

    x is overwritten if possible.
    """
    return torch.addcmul(x, gate, update, out=x if may_overwrite() else None)


def joined(whole: Tensor, text: Tensor, vision: Tensor) -> Tensor:
    """Return text tokens followed by vision tokens, (b, n, d).

    If both are views of `whole` and were overwritten in place, `whole` is returned.
    """
    return whole if may_overwrite() else torch.cat((text, vision), dim=1)


def rotate_pairs(x: Tensor) -> Tensor:
    """Return (−x₁, x₀) for each pair (x₀, x₁) of neighbouring features of x (..., features).

    The gradient of this function is its negative.
    """
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), dim=-1).flatten(-2)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (b, heads, n, head_dim) with its video tokens, which come last, rotated.

    x is overwritten if possible. RoFormer, arXiv:2104.09864, eq. 34.

    Args:
        cos, sin: (v, head_dim).
    """
    text, video = x.split((x.shape[2] - cos.shape[0], cos.shape[0]), dim=2)
    rotated = rotate_pairs(video)
    if may_overwrite():
        video.mul_(cos).addcmul_(rotated, sin)
        return x
    return torch.cat((text, torch.addcmul(video * cos, rotated, sin)), dim=2)
