"""A 2D decoder that is extended in time, so that the frames of a clip are consistent.

Blattmann et al. 2023, "Align your Latents" (arXiv:2304.08818), section 3.1.1; the parameters have the names of "Stable
Video Diffusion". Every temporal part starts as the identity, so that the decoder starts from the results of a 2D
decoder.

Shapes: frames of b clips of t frames each are a batch (b t, channel, h, w).
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from sgm.errors import UserError
from sgm.modules.attention_layers import SpatialSelfAttention
from sgm.modules.diffusionmodules.building_blocks import zero_module
from sgm.modules.diffusionmodules.model import Decoder, ResnetBlock
from sgm.modules.video_attention import (
    VideoTransformerBlock,
    clips,
    frame_embedding,
    mix_share,
    register_mix_factor,
    time_embedding,
)

KernelSize = int | Sequence[int]


class TemporalResBlock(nn.Module):
    """Two rounds of norm, SiLU and 3D convolution, with a residual: (b, channels, t, h, w)."""

    def __init__(self, channels: int, kernel_size: KernelSize, dropout: float = 0.0):
        super().__init__()
        # The indices are part of the names in checkpoints.
        self.in_layers = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), _conv3d(channels, channels, kernel_size))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(_conv3d(channels, channels, kernel_size)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out_layers(self.in_layers(x))


class VideoResBlock(ResnetBlock):
    """A 2D residual block and a 3D one, blended: (1 - a) * 2D + a * 3D.

    Args:
        video_kernel_size: of the 3D convolutions, odd: one number, or one each for time, height and width.
        alpha, merge_strategy: `fixed`: a = alpha; `learned`: a is learned and starts at sigmoid(alpha).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        video_kernel_size: KernelSize = 3,
        alpha: float = 0.0,
        merge_strategy: str = "learned",
    ):
        super().__init__(in_channels, out_channels, dropout)
        self.time_stack = TemporalResBlock(out_channels, video_kernel_size, dropout)
        register_mix_factor(self, alpha, merge_strategy)

    def forward(self, x: Tensor, timesteps: int) -> Tensor:  # type: ignore[override]  # see `VideoTransformerBlock`
        """Return (b t, out_channels, h, w) for x (b t, in_channels, h, w)."""
        x = rearrange(super().forward(x), "(b t) c h w -> b c t h w", t=timesteps)
        x = torch.lerp(x, self.time_stack(x), mix_share(self).to(x.dtype))
        return rearrange(x, "b c t h w -> (b t) c h w")


class VideoBlock(SpatialSelfAttention):
    """Self-attention within each frame and a transformer block over time, blended.

    Args: see `VideoResBlock`; `mix_factor` here stands for the *spatial* share, 1 - a.
    """

    def __init__(
        self, in_channels: int, alpha: float = 0.0, merge_strategy: str = "learned", attn_type: str = "softmax"
    ):
        super().__init__(in_channels, attn_type)
        block = VideoTransformerBlock(in_channels, 1, in_channels, ff_in=True, checkpoint=False, attn_mode=attn_type)
        self.time_mix_block = block
        self.video_time_embed = time_embedding(in_channels, in_channels)
        for layer in (
            block.ff_in.net[-1],
            block.attn1.to_out[0],
            block.attn2.to_out[0],
            block.ff.net[-1],
            self.video_time_embed[-1],
        ):
            zero_module(layer)
        register_mix_factor(self, 1 - alpha if merge_strategy == "fixed" else -alpha, merge_strategy)

    def forward(self, x: Tensor, timesteps: int) -> Tensor:  # type: ignore[override]  # see `VideoTransformerBlock`
        """Return a tensor shaped like x (b t, in_channels, h, w)."""
        within = rearrange(self.attention(x), "b c h w -> b (h w) c")
        position = self.video_time_embed(frame_embedding(x, timesteps, x.shape[1]))
        position = repeat(position, "t c -> (b t) 1 c", b=len(x) // timesteps)
        over_time = self.time_mix_block(within + position, timesteps=timesteps)
        blended = torch.lerp(over_time, within, mix_share(self).to(within.dtype))
        return x + self.proj_out(rearrange(blended, "b (h w) c -> b c h w", h=x.shape[2]))


class AE3DConv(nn.Conv2d):
    """A 2D convolution, then a 3D one: (b t, in_channels, h, w) -> (b t, out_channels, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, video_kernel_size: KernelSize = 3):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.time_mix_conv = _conv3d(out_channels, out_channels, video_kernel_size)
        nn.init.dirac_(self.time_mix_conv.weight)
        nn.init.zeros_(self.time_mix_conv.bias)

    def forward(self, x: Tensor, timesteps: int) -> Tensor:
        """Return the frames of clips of `timesteps` frames, after both convolutions."""
        x = self.time_mix_conv(rearrange(super().forward(x), "(b t) c h w -> b c t h w", t=timesteps))
        return rearrange(x, "b c t h w -> (b t) c h w")


class VideoDecoder(Decoder):
    """Latents of clips (b t, z_channels, h, w) -> frames (b t, out_ch, f * h, f * w).

    Args: those of `Decoder` (`decoder`), and
        time_mode: what is extended in time: residual blocks and the last convolution (`conv-only`), attention
            (`attn-only`), or `all` of them.
        video_kernel_size, alpha, merge_strategy: see `VideoResBlock`.

    Raises:
        UserError: an argument does not fit.
    """

    def __init__(
        self,
        *,
        time_mode: str = "conv-only",
        video_kernel_size: KernelSize = 3,
        alpha: float = 0.0,
        merge_strategy: str = "learned",
        **decoder: Any,
    ):
        if time_mode not in TIME_MODES:
            raise UserError(f"time_mode: '{time_mode}' is unknown; use one of {', '.join(TIME_MODES)}")
        if merge_strategy == "learned_with_images":
            raise UserError("merge_strategy: a decoder gets no image_only_indicator; use fixed or learned")
        try:
            inspect.signature(Decoder).bind(**decoder)
        except TypeError as error:
            raise UserError(f"VideoDecoder: {error}") from error
        self.time_mode, self.video_kernel_size = time_mode, video_kernel_size  # before the layers are made
        self.blend = alpha, merge_strategy
        super().__init__(**decoder)

    def forward(self, z: Tensor, timesteps: int) -> Tensor:  # type: ignore[override]  # see `VideoTransformerBlock`
        """Return the frames of latents; with `timesteps` 1 every latent is a separate image.

        Raises:
            UserError: (b t) is not a whole number of clips of `timesteps` frames.
        """
        clips(z, timesteps)

        def call(layer: nn.Module, h: Tensor) -> Tensor:
            return layer(h, timesteps) if isinstance(layer, MIXES_FRAMES) else layer(h)

        return self._decode(z, call)

    def get_last_layer(self, skip_time_mix: bool = False) -> nn.Parameter:
        """Return the weight of the layer that outputs the pixels.

        Args:
            skip_time_mix: return the last weight that sees each frame separately.
        """
        if isinstance(self.conv_out, AE3DConv) and not skip_time_mix:
            return self.conv_out.time_mix_conv.weight
        return self.conv_out.weight

    def _make_resblock(self, in_channels: int, out_channels: int) -> nn.Module:
        if self.time_mode == "attn-only":
            return super()._make_resblock(in_channels, out_channels)
        return VideoResBlock(in_channels, out_channels, self.dropout, self.video_kernel_size, *self.blend)

    def _make_attn(self, channels: int) -> nn.Module:
        if self.time_mode == "conv-only":
            return super()._make_attn(channels)
        kinds = {"vanilla": "softmax", "vanilla-xformers": "softmax-xformers"}
        if self.attn_type not in kinds:
            raise UserError(
                f"attn_type: '{self.attn_type}' cannot be extended in time (time_mode '{self.time_mode}'); "
                f"use {' or '.join(kinds)}"
            )
        return VideoBlock(channels, *self.blend, kinds[self.attn_type])

    def _make_conv(self, in_channels: int, out_channels: int, kernel_size: int) -> nn.Module:
        if self.time_mode == "attn-only":
            return super()._make_conv(in_channels, out_channels, kernel_size)
        return AE3DConv(in_channels, out_channels, kernel_size, self.video_kernel_size)


TIME_MODES = ("all", "conv-only", "attn-only")
MIXES_FRAMES = (VideoResBlock, VideoBlock, AE3DConv)


def _conv3d(in_channels: int, out_channels: int, kernel_size: KernelSize) -> nn.Conv3d:
    """Return a 3D convolution that keeps sizes by padding with zeros."""
    sizes = [kernel_size] * 3 if isinstance(kernel_size, int) else list(kernel_size)
    if len(sizes) != 3 or any(size % 2 == 0 for size in sizes):
        raise UserError(f"video_kernel_size: expected an odd number or three of them, got {kernel_size}")
    return nn.Conv3d(in_channels, out_channels, sizes, padding=[size // 2 for size in sizes])
