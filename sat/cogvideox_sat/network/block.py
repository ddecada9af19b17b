"""One transformer layer of CogVideoX as a function of tensors, written for a compiler.

The function computes the same as `AdaLNMixin` and the related classes in `dit_video_concat`, but does not split the
tokens into text and video and join them again. A compiler can therefore fuse everything between two matrix products
into one kernel. Because weights are arguments, one graph serves all layers.
Shapes: b batch, n tokens (text first), d width, h heads of e = d / h channels.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Full attention of q, k, v (b, h, n, e)."""


class Norm(NamedTuple):
    """A layer norm: scale and shift (None if absent), and the constant added to the variance."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class LowRank(NamedTuple):
    """The LoRA terms of a product x·Wᵀ: scale·x·Aᵢᵀ·Bᵢᵀ for the i-th of equal feature parts.

    Args:
        down, up: the Aᵢ (rank, in) and Bᵢ (out, rank). Those of several adapters are concatenated along the rank.
    """

    down: Sequence[Tensor]
    up: Sequence[Tensor]
    scale: float


class Product(NamedTuple):
    """The product x·Wᵀ + bias, with the terms of an adapter."""

    weight: Tensor
    bias: Tensor | None
    adapter: LowRank | None = None

    def __call__(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if self.adapter is None:
            return out
        down, up, scale = self.adapter
        added = [F.linear(F.linear(x, a), b) for a, b in zip(down, up, strict=True)]
        return out + scale * (added[0] if len(added) == 1 else torch.cat(added, dim=-1))


class LayerWeights(NamedTuple):
    """The tensors of one layer."""

    attention_norm: Norm
    qkv: Product
    query_norm: Norm | None
    key_norm: Norm | None
    out: Product
    mlp_norm: Norm
    up: Product
    down: Product


class Tokens(NamedTuple):
    """The kinds and positions of the tokens of a call.

    Args:
        is_text: (n, 1).
        cos, sin: (n, e) of the rotary embedding: 1 and 0 for text, and sines of even channels negated; None: the
            network has no rotary embedding.
    """

    is_text: Tensor
    cos: Tensor | None
    sin: Tensor | None


def tokens_of(text_length: int, tokens: int, rotary: tuple[Tensor, Tensor] | None, device: torch.device) -> Tokens:
    """Return the kinds and positions of the tokens of a call.

    Args:
        text_length: number of text tokens.
        tokens: number of all tokens.
        rotary: cosines and sines with rows for the video only.
    """
    is_text = (torch.arange(tokens, device=device) < text_length)[:, None]
    if rotary is None:
        return Tokens(is_text, None, None)
    cos, sin = rotary
    sin = sin * sin.new_tensor([-1.0, 1.0]).repeat(sin.shape[-1] // 2)
    return Tokens(is_text, F.pad(cos, (0, 0, text_length, 0), value=1.0), F.pad(sin, (0, 0, text_length, 0)))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (b, n, h, e), rotated in pairs of neighbouring channels.

    Args:
        cos, sin: (n, e), see `Tokens`.
    """
    exchanged = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * cos[:, None] + exchanged * sin[:, None]


def block(
    x: Tensor, modulation: Tensor, weights: LayerWeights, tokens: Tokens, heads: int, attend: Attend, kernel: str
) -> Tensor:
    """Return the tokens x (b, n, d) after a layer with pre-norm and adaLN-Zero.

    Args:
        modulation: (b, 12 d): shift, scale and gate of both branches, first for the video, then for the text.
        kernel: name of the kernel that `attend` uses. A compiled graph contains its kernel, so another name makes
            another graph.
    """
    parts = modulation[:, None].chunk(12, dim=-1)
    shift1, scale1, gate1, shift2, scale2, gate2 = (
        torch.where(tokens.is_text, text, video) for video, text in zip(parts[:6], parts[6:], strict=True)
    )

    q, k, v = weights.qkv(weights.attention_norm(x) * (1 + scale1) + shift1).unflatten(-1, (3, heads, -1)).unbind(2)
    if weights.query_norm is not None and weights.key_norm is not None:
        q, k = weights.query_norm(q), weights.key_norm(k)
    if tokens.cos is not None and tokens.sin is not None:
        q, k = rotated(q, tokens.cos, tokens.sin), rotated(k, tokens.cos, tokens.sin)
    attended = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)
    x = x + gate1 * weights.out(attended)

    inner = F.gelu(weights.up(weights.mlp_norm(x) * (1 + scale2) + shift2), approximate="tanh")
    return x + gate2 * weights.down(inner)
