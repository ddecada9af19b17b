"""Transformer blocks of attention and feed-forward networks, over tokens or over an image.

Shapes: b batch, n tokens, m context tokens, c channels, h and w height and width.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from sgm.errors import UserError
from sgm.modules.attention_layers import Normalize, cross_attention
from sgm.modules.diffusionmodules.building_blocks import zero_module

# ---------------------------------------------------------------- feed-forward


class GEGLU(nn.Module):
    """A linear map that is gated by the GELU of another: (..., dim_in) -> (..., dim_out).

    Shazeer, "GLU Variants Improve Transformer", sec. 2.
    """

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., dim_out) for x (..., dim_in)."""
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
        """Return (..., dim_out) for x (..., dim)."""
        return self.net(x)


# ---------------------------------------------------------------- transformers


def checkpointed(forward: Callable[..., Tensor], *arguments: Tensor | int | None) -> Tensor:
    """Return forward(*arguments), keeping only the arguments for the backward pass."""
    return checkpoint(forward, *arguments, use_reentrant=False)


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
