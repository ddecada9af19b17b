"""Attention over tokens and over pixels, and the transformer blocks made of it.

Shapes: b batch, n tokens, m context tokens, c channels, h and w height and width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from sgm.attention_kernels import (
    ATTENTION,
    attend,
    attend_memory_efficiently,
    attend_with_xformers,
    backend_named,
    kernel_named,
)
from sgm.errors import UserError
from sgm.helpers import default, exists, uniq
from sgm.modules.diffusionmodules.building_blocks import zero_module

__all__ = [
    "ATTENTION",
    "GEGLU",
    "BasicTransformerBlock",
    "BasicTransformerSingleLayerBlock",
    "CrossAttention",
    "FeedForward",
    "LinearAttention",
    "MemoryEfficientCrossAttention",
    "Normalize",
    "SDPBackend",
    "SpatialSelfAttention",
    "SpatialTransformer",
    "attend",
    "attend_memory_efficiently",
    "attend_with_xformers",
    "default",
    "exists",
    "init_",
    "max_neg_value",
    "uniq",
    "zero_module",
]


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


# ---------------------------------------------------------------- feed-forward


class GEGLU(nn.Module):
    """A linear map that is gated by the GELU of another: (..., dim_in) -> (..., dim_out).

    Shazeer, "GLU Variants Improve Transformer", sec. 2.
    """

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The two-layer network of a transformer block: (..., dim) -> (..., dim_out).

    The layer between is `mult` times as wide as the input.
    """

    def __init__(self, dim: int, dim_out: int | None = None, mult: float = 4, glu: bool = False, dropout: float = 0.0):
        super().__init__()
        inner = int(dim * mult)
        project_in = GEGLU(dim, inner) if glu else nn.Sequential(nn.Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(project_in, nn.Dropout(dropout), nn.Linear(inner, dim_out or dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


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


# ---------------------------------------------------------------- transformers


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to a context and a feed-forward network, each with a residual.

    Each of the three normalizes its input first.

    Args:
        checkpoint: recompute the block in the backward pass instead of keeping its activations.
        disable_self_attn: the first attention attends to the context too.
        attn_mode: `softmax`, or `softmax-xformers`.
        sdp_backend: see `CrossAttention`.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
        disable_self_attn: bool = False,
        attn_mode: str = "softmax",
        sdp_backend: SDPBackend | str | None = None,
    ):
        super().__init__()
        heads = {"heads": n_heads, "dim_head": d_head, "dropout": dropout, "backend": sdp_backend}
        self.checkpoint, self.disable_self_attn = checkpoint, disable_self_attn
        self.attn1 = cross_attention(
            attn_mode, query_dim=dim, context_dim=context_dim if disable_self_attn else None, **heads
        )
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = cross_attention(attn_mode, query_dim=dim, context_dim=context_dim, **heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        additional_tokens: Tensor | None = None,
        n_times_crossframe_attn_in_self: int = 0,
    ) -> Tensor:
        """Return (b, n, dim) for tokens x (b, n, dim) and a context (b, m, context_dim).

        See `CrossAttention` for the other arguments.
        """
        arguments = (x, context, additional_tokens, n_times_crossframe_attn_in_self)
        return checkpointed(self._forward, *arguments) if self.checkpoint else self._forward(*arguments)

    def _forward(self, x: Tensor, context: Tensor | None, additional_tokens: Tensor | None, frames: int) -> Tensor:
        if self.disable_self_attn:
            x = x + self.attn1(self.norm1(x), context, additional_tokens=additional_tokens)
        else:
            x = x + self.attn1(
                self.norm1(x), additional_tokens=additional_tokens, n_times_crossframe_attn_in_self=frames
            )
        x = x + self.attn2(self.norm2(x), context, additional_tokens=additional_tokens)
        return x + self.ff(self.norm3(x))


class BasicTransformerSingleLayerBlock(nn.Module):
    """Attention to a context (or to the tokens) and a feed-forward network, with residuals.

    Args: those of `BasicTransformerBlock`.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
        attn_mode: str = "softmax",
        sdp_backend: SDPBackend | str | None = None,
    ):
        super().__init__()
        self.checkpoint = checkpoint
        heads = {"heads": n_heads, "dim_head": d_head, "dropout": dropout, "backend": sdp_backend}
        self.attn1 = cross_attention(attn_mode, query_dim=dim, context_dim=context_dim, **heads)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return (b, n, dim) for tokens x (b, n, dim) and a context (b, m, context_dim)."""
        return checkpointed(self._forward, x, context) if self.checkpoint else self._forward(x, context)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x), context)
        return x + self.ff(self.norm2(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of an image (b, in_channels, h, w), with a residual.

    The output projection starts at zero, so that the module starts as the identity.

    Args:
        depth: number of blocks.
        context_dim: size of a context token, for all blocks or for each. Equal sizes whose number differs from `depth`
            apply to all blocks.
        use_linear: project tokens by a linear layer rather than pixels by a 1x1 convolution.
        attn_type: `softmax`, or `softmax-xformers`.
        use_checkpoint: recompute each block in the backward pass instead of keeping its activations.
        sdp_backend: see `CrossAttention`.

    Raises:
        UserError: `context_dim` has different sizes, and their number is not `depth`.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | Sequence[int] | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        attn_type: str = "softmax",
        use_checkpoint: bool = True,
        sdp_backend: SDPBackend | str | None = None,
    ):
        super().__init__()
        inner = n_heads * d_head
        context_dims = list(context_dim) if isinstance(context_dim, Sequence) else [context_dim]
        if len(set(context_dims)) == 1:
            context_dims = depth * context_dims[:1]
        if len(context_dims) != depth:
            raise UserError(f"context_dim: got {len(context_dims)} sizes, {context_dims}; give one, or {depth} (depth)")
        self.in_channels, self.inner_dim, self.use_linear = in_channels, inner, use_linear
        self.norm = Normalize(in_channels)
        self.proj_in = nn.Linear(in_channels, inner) if use_linear else nn.Conv2d(in_channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner,
                n_heads,
                d_head,
                dropout=dropout,
                context_dim=each,
                disable_self_attn=disable_self_attn,
                attn_mode=attn_type,
                checkpoint=use_checkpoint,
                sdp_backend=sdp_backend,
            )
            for each in context_dims
        )
        self.proj_out = zero_module(nn.Linear(inner, in_channels) if use_linear else nn.Conv2d(inner, in_channels, 1))

    def forward(self, x: Tensor, context: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """Return images shaped like x (b, in_channels, h, w).

        Args:
            context: (b, m, context_dim), for all blocks, alone or in a list of one; or a list with one for each block.

        Raises:
            UserError: the list has neither one context nor one for each block.
        """
        tokens = self.tokens(x)
        for block, each in zip(self.transformer_blocks, self.contexts(context), strict=True):
            tokens = block(tokens, each)
        return x + self.image(tokens, x.shape[2])

    def contexts(self, context: Tensor | Sequence[Tensor] | None) -> list[Tensor | None]:
        """Return the context of each block."""
        blocks = len(self.transformer_blocks)
        contexts = list(context) if isinstance(context, Sequence) else [context]
        if len(contexts) == 1:
            contexts = blocks * contexts
        if len(contexts) != blocks:
            raise UserError(f"context: {len(contexts)} contexts for {blocks} blocks; pass one, or one for each block")
        return contexts

    def tokens(self, x: Tensor) -> Tensor:
        """Return the image's tokens (b, h * w, inner)."""
        x = self.norm(x)
        if self.use_linear:
            return self.proj_in(rearrange(x, "b c h w -> b (h w) c"))
        return rearrange(self.proj_in(x), "b c h w -> b (h w) c")

    def image(self, tokens: Tensor, height: int) -> Tensor:
        """Return the image (b, in_channels, h, w) of tokens (b, h * w, inner)."""
        if self.use_linear:
            return rearrange(self.proj_out(tokens), "b (h w) c -> b c h w", h=height)
        return self.proj_out(rearrange(tokens, "b (h w) c -> b c h w", h=height))


def checkpointed(forward: Callable[..., Tensor], *arguments: Tensor | int | None) -> Tensor:
    """Return forward(*arguments), keeping only the arguments for the backward pass."""
    return checkpoint(forward, *arguments, use_reentrant=False)
