"""One transformer layer of CogVideoX as a function of tensors alone, written for a compiler.

It computes what `AdaLNMixin` and its neighbours in `dit_video_concat` do together, in other words: nothing is split
into text and video and joined again, so that a compiler fuses all that lies between two matrix products into one
kernel. Since weights are arguments, one graph serves all layers.

Shapes: b batch, n tokens, text first, d width, h heads of e = d / h channels.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Full attention of q, k, v (b, h, n, e)."""


class Norm(NamedTuple):
    """Scale and shift of a layer norm, None where it has none, and what is added to the variance."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class LowRank(NamedTuple):
    """What LoRA adds to parts of a product: scale·x·Aᵢᵀ·Bᵢᵀ to the i-th of equal parts."""

    down: Sequence[Tensor]
    up: Sequence[Tensor]
    scale: float


class Product(NamedTuple):
    """x·Wᵀ + bias, and what an adapter adds."""

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
    """What the tokens of a call are.

    Args:
        is_text: (n, 1).
        cos, sin: (n, e) of the rotary embedding, 1 and 0 for text, the sines of even channels negative; None: there is
            no rotary embedding.
    """

    is_text: Tensor
    cos: Tensor | None
    sin: Tensor | None


def tokens_of(text_length: int, tokens: int, rotary: tuple[Tensor, Tensor] | None, device: torch.device) -> Tokens:
    """Return what the tokens are of a call with so much text; `rotary` has rows for the video alone."""
    is_text = (torch.arange(tokens, device=device) < text_length)[:, None]
    if rotary is None:
        return Tokens(is_text, None, None)
    cos, sin = rotary
    sin = sin * sin.new_tensor([-1.0, 1.0]).repeat(sin.shape[-1] // 2)
    return Tokens(is_text, F.pad(cos, (0, 0, text_length, 0), value=1.0), F.pad(sin, (0, 0, text_length, 0)))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (b, n, h, e) turned by angles, in pairs of neighbouring channels.

    Args:
        cos, sin: (n, e), see `Tokens`.
    """
    exchanged = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * cos[:, None] + exchanged * sin[:, None]


def block(
    x: Tensor, modulation: Tensor, weights: LayerWeights, tokens: Tokens, heads: int, attend: Attend, kernel: str
) -> Tensor:
    """Return the tokens x (b, n, d) after a layer: pre-norm, adaLN-Zero.

    Args:
        modulation: (b, 12 d), shift, scale and gate of both branches, for the video and then for the text.
        kernel: names what `attend` runs on; a graph holds the one of its own, so another name is another graph.
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
