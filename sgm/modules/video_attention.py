"""Transformers over video: attention within each frame, then across frames, blended.

Blattmann et al., "Align your Latents: High-Resolution Video Synthesis with Latent Diffusion Models", sec. 3.1. The
parameters have the names of "Stable Video Diffusion".

Shapes: b clips of t frames form a batch of (b t) frames; s = h * w places in a frame, c channels.
"""

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from sgm.errors import UserError
from sgm.modules.attention_layers import cross_attention
from sgm.modules.diffusionmodules.util import append_dims, timestep_embedding
from sgm.modules.transformer_blocks import BasicTransformerBlock, FeedForward, SpatialTransformer, checkpointed

MERGE_STRATEGIES = ("fixed", "learned", "learned_with_images")


def clips(frames: Tensor, timesteps: int | None) -> tuple[int, int]:
    """Return the number of clips in a batch of `frames` (b t, ...), and `timesteps`.

    Args:
        timesteps: the number of frames of each clip.

    Raises:
        UserError: `timesteps` is missing, or does not divide the batch.
    """
    if timesteps is None:
        raise UserError("timesteps: the number of frames of a clip: missing; pass it to the call or the constructor")
    if timesteps < 1 or len(frames) % timesteps:
        raise UserError(f"a batch of {len(frames)} frames does not hold whole clips of {timesteps}")
    return len(frames) // timesteps, timesteps


# ---------------------------------------------------------------- blending


def register_mix_factor(module: nn.Module, alpha: float, merge_strategy: str) -> None:
    """Add a `mix_factor` to `module`: a constant share, or the logit of a learned share.

    Args:
        alpha: the constant share, or the logit that training starts from.

    Raises:
        UserError: the strategy is unknown, or a fixed share is outside [0, 1].
    """
    if merge_strategy not in MERGE_STRATEGIES:
        raise UserError(f"merge_strategy: '{merge_strategy}' is unknown; use one of {', '.join(MERGE_STRATEGIES)}")
    if merge_strategy == "fixed":
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha: a fixed share: got {alpha:g}; it must be between 0 and 1")
        module.register_buffer("mix_factor", torch.tensor([float(alpha)]))
    else:
        module.mix_factor = nn.Parameter(torch.tensor([float(alpha)]))


def mix_share(module: nn.Module) -> Tensor:
    """Return the share (1,) that `mix_factor` represents."""
    factor = module.mix_factor
    return factor.sigmoid() if isinstance(factor, nn.Parameter) else factor


class AlphaBlender(nn.Module):
    """Blend of two branches: share * spatial + (1 - share) * temporal.

    Args:
        alpha: the spatial share if the strategy is `fixed`, otherwise the logit that training starts from.
        merge_strategy: `fixed`; `learned`; or `learned_with_images`, where frames that are separate images use the
            spatial branch alone.
    """

    def __init__(self, alpha: float, merge_strategy: str = "learned_with_images"):
        super().__init__()
        register_mix_factor(self, alpha, merge_strategy)
        self.with_images = merge_strategy == "learned_with_images"

    def forward(self, x_spatial: Tensor, x_temporal: Tensor, image_only_indicator: Tensor | None = None) -> Tensor:
        """Return the blend of two branches (b t, ...).

        Args:
            image_only_indicator: (b, t), true (or 1) for separate images. None: there are none.
        """
        share = mix_share(self)
        if self.with_images and image_only_indicator is not None:
            share = torch.where(image_only_indicator.flatten().bool(), torch.ones_like(share), share)
        return torch.lerp(x_temporal, x_spatial, append_dims(share, x_spatial.ndim).to(x_spatial.dtype))


# ---------------------------------------------------------------- transformers


class VideoTransformerBlock(BasicTransformerBlock):
    """A transformer block over the frames of each clip, applied at each place separately.

    Args: those of `BasicTransformerBlock`, and
        timesteps: number of frames of each clip, unless a call gives it.
        ff_in: begin with another feed-forward network, with a norm and a residual.
        inner_dim: accepted at its neutral value, `dim`.
        disable_temporal_crossattention: leave out the attention to a context.
        switch_temporal_ca_to_sa: the second attention is also between frames.
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
        timesteps: int | None = None,
        ff_in: bool = False,
        inner_dim: int | None = None,
        attn_mode: str = "softmax",
        disable_self_attn: bool = False,
        disable_temporal_crossattention: bool = False,
        switch_temporal_ca_to_sa: bool = False,
        sdp_backend: SDPBackend | str | None = None,
    ):
        if inner_dim not in (None, dim):
            raise UserError(f"inner_dim: {inner_dim} is not supported; the block is {dim} channels wide, as its input")
        super().__init__(
            dim, n_heads, d_head, dropout, context_dim, gated_ff, checkpoint, disable_self_attn, attn_mode, sdp_backend
        )
        self.timesteps, self.switch_temporal_ca_to_sa = timesteps, switch_temporal_ca_to_sa
        if disable_temporal_crossattention and switch_temporal_ca_to_sa:
            raise UserError(
                "disable_temporal_crossattention and switch_temporal_ca_to_sa are both on; choose one of them"
            )
        if disable_temporal_crossattention:
            del self.attn2, self.norm2
        if switch_temporal_ca_to_sa:
            self.attn2 = cross_attention(
                attn_mode, query_dim=dim, heads=n_heads, dim_head=d_head, dropout=dropout, backend=sdp_backend
            )
        if ff_in:
            self.norm_in = nn.LayerNorm(dim)
            self.ff_in = FeedForward(dim, dropout=dropout, glu=gated_ff)

    def forward(  # type: ignore[override]  # PyTorch leaves the arguments of `forward` to each module
        self, x: Tensor, context: Tensor | None = None, timesteps: int | None = None
    ) -> Tensor:
        """Return (b t, s, dim) for x (b t, s, dim) and a context (b s, m, context_dim).

        Raises:
            UserError: (b t) is not a whole number of clips of `timesteps` frames.
        """
        _, timesteps = clips(x, self.timesteps if timesteps is None else timesteps)
        arguments = (x, context, timesteps)
        return checkpointed(self._mix, *arguments) if self.checkpoint else self._mix(*arguments)

    def _mix(self, x: Tensor, context: Tensor | None, timesteps: int) -> Tensor:
        places = x.shape[1]
        x = rearrange(x, "(b t) s c -> (b s) t c", t=timesteps)
        if hasattr(self, "ff_in"):
            x = x + self.ff_in(self.norm_in(x))
        x = x + self.attn1(self.norm1(x), context if self.disable_self_attn else None)
        if hasattr(self, "attn2"):
            x = x + self.attn2(self.norm2(x), None if self.switch_temporal_ca_to_sa else context)
        x = x + self.ff(self.norm3(x))
        return rearrange(x, "(b s) t c -> (b t) s c", s=places)


class SpatialVideoTransformer(SpatialTransformer):
    """A spatial transformer with a temporal block after each of its blocks.

    Input and output are (b t, in_channels, h, w).

    Args: those of `SpatialTransformer`, and
        timesteps: number of frames of each clip, unless a call gives it.
        disable_temporal_crossattention: see `VideoTransformerBlock`.
        use_spatial_context: the temporal blocks attend to the context of each clip's first frame.
        time_context_dim: size of a token of `time_context`, which replaces that context.
        merge_strategy, merge_factor: how the two branches are blended; see `AlphaBlender`.
        ff_in: see `VideoTransformerBlock`.
        max_time_embed_period: the longest period, in frames, of the embedding of a frame's place in its clip.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        use_linear: bool = False,
        context_dim: int | Sequence[int] | None = None,
        use_spatial_context: bool = False,
        timesteps: int | None = None,
        merge_strategy: str = "fixed",
        merge_factor: float = 0.5,
        time_context_dim: int | None = None,
        ff_in: bool = False,
        checkpoint: bool = False,
        time_depth: int = 1,
        attn_mode: str = "softmax",
        disable_self_attn: bool = False,
        disable_temporal_crossattention: bool = False,
        max_time_embed_period: float = 10000,
        sdp_backend: SDPBackend | str | None = None,
    ):
        if time_depth != 1:
            raise UserError(f"time_depth: {time_depth} is not supported; each spatial block has one temporal block")
        super().__init__(
            in_channels,
            n_heads,
            d_head,
            depth=depth,
            dropout=dropout,
            context_dim=context_dim,
            disable_self_attn=disable_self_attn,
            use_linear=use_linear,
            attn_type=attn_mode,
            use_checkpoint=checkpoint,
            sdp_backend=sdp_backend,
        )
        self.timesteps = timesteps
        if isinstance(context_dim, Sequence):
            context_dim = context_dim[0] if len(set(context_dim)) == 1 else None
            if context_dim is None and use_spatial_context:
                raise UserError("context_dim: with use_spatial_context all blocks share one size; give one number")
        self.use_spatial_context, self.max_time_embed_period = use_spatial_context, max_time_embed_period
        self.time_stack = nn.ModuleList(
            VideoTransformerBlock(
                self.inner_dim,
                n_heads,
                d_head,
                ff_in=ff_in,
                dropout=dropout,
                context_dim=context_dim if use_spatial_context else time_context_dim,
                disable_self_attn=disable_self_attn,
                disable_temporal_crossattention=disable_temporal_crossattention,
                attn_mode=attn_mode,
                checkpoint=checkpoint,
                sdp_backend=sdp_backend,
            )
            for _ in range(depth)
        )
        self.time_pos_embed = time_embedding(in_channels, self.inner_dim)
        self.time_mixer = AlphaBlender(merge_factor, merge_strategy)

    def forward(
        self,
        x: Tensor,
        context: Tensor | Sequence[Tensor] | None = None,
        time_context: Tensor | None = None,
        timesteps: int | None = None,
        image_only_indicator: Tensor | None = None,
    ) -> Tensor:
        """Return images shaped like x (b t, in_channels, h, w).

        Args:
            context: (b t, m, context_dim), for the spatial blocks; or a list, see `SpatialTransformer`.
            time_context: (b, m, time_context_dim), for the temporal blocks.
            timesteps: the number of frames t of each clip.
            image_only_indicator: see `AlphaBlender`.

        Raises:
            UserError: (b t) is not a whole number of clips of `timesteps` frames, or the context for the temporal
                blocks is missing.
        """
        batch, timesteps = clips(x, self.timesteps if timesteps is None else timesteps)
        height, width = x.shape[2:]
        contexts = self.contexts(context)
        if self.use_spatial_context:
            if contexts[0] is None:
                raise UserError("use_spatial_context: the temporal blocks need a context (frames, tokens, channels)")
            time_context = contexts[0][::timesteps]
        if time_context is not None:
            time_context = repeat(time_context, "b m c -> (b s) m c", s=height * width)
        position = frame_embedding(x, timesteps, self.in_channels, self.max_time_embed_period)
        position = repeat(self.time_pos_embed(position), "t c -> (b t) 1 c", b=batch)

        tokens = self.tokens(x)
        for block, time_block, each in zip(self.transformer_blocks, self.time_stack, contexts, strict=True):
            tokens = block(tokens, each)
            over_time = time_block(tokens + position, time_context, timesteps=timesteps)
            tokens = self.time_mixer(tokens, over_time, image_only_indicator)
        return x + self.image(tokens, height)


def frame_embedding(x: Tensor, timesteps: int, dim: int, max_period: float = 10000) -> Tensor:
    """Return the sinusoidal embedding (t, dim) of each frame's place in its clip.

    The embedding has the device and dtype of `x`.
    """
    return timestep_embedding(torch.arange(timesteps, device=x.device), dim, max_period, dtype=x.dtype)


def time_embedding(dim: int, out_dim: int) -> nn.Sequential:
    """Return the network (..., dim) -> (..., out_dim) that follows `frame_embedding`."""
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, out_dim))
