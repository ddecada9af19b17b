"""Attention over tokens and over the pixels of an image.

Shapes: b batch, n tokens, m context tokens, c channels, h and w height and width.
"""

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from sgm.attention_kernels import attend, attend_memory_efficiently, backend_named, kernel_named
from sgm.errors import UserError


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """Return a group normalization with an epsilon of 1e-6, as these networks use it."""
    return nn.GroupNorm(num_groups, in_channels, eps=1e-6)


def max_neg_value(t: Tensor) -> float:
    """Return the lowest finite number of the tensor's dtype, for masking before a softmax."""
    return -torch.finfo(t.dtype).max


@torch.no_grad()
def init_(tensor: Tensor) -> Tensor:
    """Fill the tensor from U(-1/sqrt(d), 1/sqrt(d)), d its last size, and return it."""
    bound = tensor.shape[-1] ** -0.5
    return tensor.uniform_(-bound, bound)


# ---------------------------------------------------------------- attention over an image


class LinearAttention(nn.Module):
    """Attention between pixels in linear time: (b, dim, h, w) -> the same shape.

    Shen et al., "Efficient Attention: Attention with Linear Complexities", sec. 3.2, without the queries' softmax. The
    keys' softmax runs over the pixels.
    """

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended pixels (b, dim, h, w), without a residual."""
        height, width = x.shape[2:]
        q, k, v = rearrange(self.to_qkv(x), "b (qkv heads d) h w -> qkv b heads d (h w)", qkv=3, heads=self.heads)
        summary = v @ k.softmax(dim=-1).transpose(-1, -2)  # (b, heads, d, d): the size does not depend on the image
        out = rearrange(summary @ q, "b heads d (h w) -> b (heads d) h w", h=height, w=width)
        return self.to_out(out)


class SpatialSelfAttention(nn.Module):
    """Self-attention of an image's pixels with a residual: (b, in_channels, h, w) -> same."""

    def __init__(self, in_channels: int, attn_type: str = "softmax"):
        super().__init__()
        self.attend = kernel_named(attn_type)
        self.norm = Normalize(in_channels)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def attention(self, x: Tensor) -> Tensor:
        """Return the attended values (b, c, h, w), before the output projection."""
        normed = self.norm(x)
        q, k, v = (rearrange(layer(normed), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        return rearrange(self.attend(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])

    def forward(self, x: Tensor) -> Tensor:
        """Return the pixels (b, in_channels, h, w) after attention, with the residual."""
        return x + self.proj_out(self.attention(x))


# ---------------------------------------------------------------- attention over tokens


class CrossAttention(nn.Module):
    """Attention of tokens to a context, or to each other where a call gives no context.

    Tokens are (b, n, query_dim), the context is (b, m, context_dim).

    Args:
        backend: the PyTorch kernel to use, a member of `SDPBackend` or its name. None: PyTorch chooses.
        attn_mode: name of an attention function that replaces the class's own, see `attention_kernels`.

    Raises:
        UserError: a name is unknown, or (on a forward pass) the kernel cannot compute these tensors.
    """

    attend = staticmethod(attend)

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        backend: SDPBackend | str | None = None,
        *,
        attn_mode: str | None = None,
    ):
        super().__init__()
        if attn_mode is not None:
            self.attend = kernel_named(attn_mode)
        inner = heads * dim_head
        self.heads = heads
        self.backend = backend_named(backend)
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or query_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or query_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        additional_tokens: Tensor | None = None,
        n_times_crossframe_attn_in_self: int = 0,
    ) -> Tensor:
        """Return the attended tokens, shaped like `x` (b, n, query_dim).

        Args:
            mask: bool, (b, m) or (b, n, m), True where a query may attend.
            additional_tokens: (b, extra, query_dim), placed in front of `x` and not returned.
            n_times_crossframe_attn_in_self: number of frames of each clip in the batch; every frame attends to the
                first frame of its clip. 0: no attention across frames.

        Raises:
            UserError: the batch is not a whole number of such clips.
        """
        extra = 0
        if additional_tokens is not None:
            extra = additional_tokens.shape[1]
            x = torch.cat([additional_tokens, x], dim=1)
        context = x if context is None else context
        frames = n_times_crossframe_attn_in_self or 1
        if len(context) % frames:
            raise UserError(f"cross-frame attention: a batch of {len(context)} is not a multiple of {frames} frames")
        first = context[::frames]
        q, k, v = (
            rearrange(tokens, "b n (heads d) -> b heads n d", heads=self.heads)
            for tokens in (self.to_q(x), self.to_k(first), self.to_v(first))
        )
        if frames > 1:
            k, v = (repeat(each, "b ... -> (b frames) ...", frames=frames) for each in (k, v))
        if mask is not None:
            mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        out = rearrange(self.attend(q, k, v, mask, self.backend), "b heads n d -> b n (heads d)")
        return self.to_out(out[:, extra:])


class MemoryEfficientCrossAttention(CrossAttention):
    """`CrossAttention` by xformers where xformers is installed and supports the tensors."""

    attend = attend_memory_efficiently


def cross_attention(attn_mode: str, **params: Any) -> CrossAttention:
    """Return the attention layer that a configuration selects by `attn_mode`."""
    kind = MemoryEfficientCrossAttention if attn_mode == attend_memory_efficiently.name else CrossAttention
    return kind(attn_mode=attn_mode, **params)
