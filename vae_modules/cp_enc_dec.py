"""The causal 3D encoder and decoder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgm.errors import UserError
from sgm.modules.autoencoding.clip import Chunk
from sgm.modules.autoencoding.waiting import WaitingRoom
from vae_modules import piecewise, whole
from vae_modules.convolutions import CausalConv3d
from vae_modules.initialization import NOISE, initialize
from vae_modules.normalization import GroupNorm, SpatialNorm3D
from vae_modules.recomputation import check_levels, run_layer
from vae_modules.resampling import Downsample3D, Upsample3D
from vae_modules.residual_block import ResnetBlock3D


class ContextParallelEncoder3D(nn.Module):
    """Video (b, in_channels, 4k+1, H, W) -> moments (b, 2 * z_channels, k+1, H/8, W/8).

    The sizes are those of four levels. Every level but the last halves space, and the first
    log2(temporal_compress_times) levels also halve time. Under context parallelism the frames are those of this rank;
    see `Chunk`.

    Args:
        ch, ch_mult: level i has ch * ch_mult[i] channels.
        double_z: return means and log-variances rather than z_channels values.
        gather_norm: take normalization statistics over the frames of all ranks.
        norm_groups: number of groups of channels that are normalized together; it must divide the channels of every
            level.
        checkpoint_levels: levels whose activations are recomputed in the backward pass, which saves memory and costs
            another forward pass of these levels. Level i is that of ch_mult[i]; level 0 takes the most memory.
        resolution, out_ch, attn_resolutions: accepted from configurations, without effect; there is no attention.
        resamp_with_conv, pad_mode, use_linear_attn, attn_type, give_pre_end, tanh_out, add_conv, zq_ch: accepted from
            configurations at the only supported values (see `NEUTRAL`); `zq_ch` is `z_channels`.

    Raises:
        UserError: a setting is unknown or does not fit.
    """

    def __init__(
        self,
        *,
        ch: int,
        z_channels: int,
        in_channels: int = 3,
        out_ch: int = 3,
        ch_mult: Sequence[int] = (1, 2, 2, 4),
        num_res_blocks: int,
        dropout: float = 0.0,
        double_z: bool = True,
        gather_norm: bool = False,
        norm_groups: int = 32,
        temporal_compress_times: int = 4,
        attn_resolutions: Sequence[int] = (),
        resolution: int | None = None,
        checkpoint_levels: Sequence[int] = (),
        resamp_with_conv: bool = True,
        pad_mode: str = "first",
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        give_pre_end: bool = False,
        tanh_out: bool = False,
        add_conv: bool = False,
        zq_ch: int | None = None,
    ):
        super().__init__()
        _refuse_attention(attn_resolutions)
        _check_neutral(
            resamp_with_conv=resamp_with_conv,
            pad_mode=pad_mode,
            use_linear_attn=use_linear_attn,
            attn_type=attn_type,
            give_pre_end=give_pre_end,
            tanh_out=tanh_out,
            add_conv=add_conv,
            zq_ch=zq_ch in (None, z_channels),
        )
        time_levels = _time_levels(temporal_compress_times, len(ch_mult))
        self.checkpoint_levels, self.dropout = check_levels(checkpoint_levels, len(ch_mult)), dropout
        self.time_factor, self.space_factor = temporal_compress_times, 2 ** (len(ch_mult) - 1)

        def block(in_channels: int, out_channels: int) -> ResnetBlock3D:
            return ResnetBlock3D(in_channels, out_channels, dropout, None, gather_norm, norm_groups)

        self.conv_in = CausalConv3d(in_channels, ch, 3)

        channels = ch
        self.down = nn.ModuleList()
        for level, multiple in enumerate(ch_mult):
            down = nn.Module()
            down.block = nn.ModuleList()
            for _ in range(num_res_blocks):
                down.block.append(block(channels, ch * multiple))
                channels = ch * multiple
            if level < len(ch_mult) - 1:
                down.downsample = Downsample3D(channels, compress_time=level < time_levels)
            self.down.append(down)

        self.mid = nn.Module()
        self.mid.block_1 = block(channels, channels)
        self.mid.block_2 = block(channels, channels)

        self.norm_out = GroupNorm(channels, gather_norm, norm_groups)
        self.conv_out = CausalConv3d(channels, 2 * z_channels if double_z else z_channels, 3)
        initialize(self)
        if double_z:
            nn.init.constant_(self.conv_out.conv.bias[z_channels:], NOISE)

    def forward(self, x: Tensor, chunk: Chunk | None = None) -> Tensor:
        """Return the moments of a whole clip, or of the part that `chunk` describes."""
        chunk = chunk or Chunk(lead=x.shape[2] % 2 == 1)
        if not (torch.is_grad_enabled() or self._drops_out):
            return whole.run(self._layers(), self.norm_out, self.conv_out, x, chunk)
        h = self.conv_in(x, chunk)
        for level, down in enumerate(self.down):
            recompute = level in self.checkpoint_levels
            for layer in _layers_of(down):
                h = run_layer(layer, h, chunk, recompute=recompute)
        h = self.mid.block_2(self.mid.block_1(h, chunk), chunk)
        return self.conv_out(self.norm_out(h, chunk), chunk)

    @property
    def _drops_out(self) -> bool:
        return self.training and self.dropout > 0

    def _layers(self) -> list[whole.Layer]:
        """Return the layers before `norm_out`, in order."""
        down = [layer for level in self.down for layer in _layers_of(level)]
        return [self.conv_in, *down, self.mid.block_1, self.mid.block_2]

    def in_pieces(self, x: Tensor, chunk: Chunk, steps: int, room: WaitingRoom) -> Tensor:
        """Return the result of a call, computed by `steps` latent frames at a time.

        See `piecewise`; no gradients are taken.

        Args:
            room: the store of pieces between layers.
        """
        lengths = _lengths(x.shape[2], steps * self.time_factor, self.time_factor - 1 if chunk.lead else 0)
        pieces = piecewise.cut(x, lengths, chunk, None, room)
        return piecewise.run(self._layers(), self.norm_out, self.conv_out, pieces)

    def piece_bytes(self, x: Tensor, steps: int) -> int:
        """Return an estimate of the bytes of `in_pieces`, without weights and stored pieces."""
        places = x.shape[0] * steps * self.time_factor * x.shape[3] * x.shape[4]
        return piecewise.MAPS * places * self.conv_in.conv.out_channels * x.element_size()


class ContextParallelDecoder3D(nn.Module):
    """Latent (batch, z_channels, k+1, h, w) -> video (batch, out_ch, 4k+1, 8h, 8w).

    The decoder mirrors the encoder, with one more block per level and norms conditioned on the latent. An even number n
    of latent frames has no frame that stands alone, and gives 4n frames.

    Args: those of the encoder.
    """

    def __init__(
        self,
        *,
        ch: int,
        z_channels: int,
        in_channels: int = 3,
        out_ch: int = 3,
        ch_mult: Sequence[int] = (1, 2, 2, 4),
        num_res_blocks: int,
        dropout: float = 0.0,
        double_z: bool = True,
        gather_norm: bool = False,
        norm_groups: int = 32,
        temporal_compress_times: int = 4,
        attn_resolutions: Sequence[int] = (),
        resolution: int | None = None,
        checkpoint_levels: Sequence[int] = (),
        resamp_with_conv: bool = True,
        pad_mode: str = "first",
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        give_pre_end: bool = False,
        tanh_out: bool = False,
        add_conv: bool = False,
        zq_ch: int | None = None,
    ):
        super().__init__()
        _refuse_attention(attn_resolutions)
        _check_neutral(
            resamp_with_conv=resamp_with_conv,
            pad_mode=pad_mode,
            use_linear_attn=use_linear_attn,
            attn_type=attn_type,
            give_pre_end=give_pre_end,
            tanh_out=tanh_out,
            add_conv=add_conv,
            zq_ch=zq_ch in (None, z_channels),
        )
        time_levels = _time_levels(temporal_compress_times, len(ch_mult))
        self.checkpoint_levels, self.dropout = check_levels(checkpoint_levels, len(ch_mult)), dropout
        self.time_factor, self.space_factor = temporal_compress_times, 2 ** (len(ch_mult) - 1)

        def block(in_channels: int, out_channels: int) -> ResnetBlock3D:
            return ResnetBlock3D(in_channels, out_channels, dropout, z_channels, gather_norm, norm_groups)

        channels = ch * ch_mult[-1]
        self.conv_in = CausalConv3d(z_channels, channels, 3)

        self.mid = nn.Module()
        self.mid.block_1 = block(channels, channels)
        self.mid.block_2 = block(channels, channels)

        levels = []
        for level, multiple in reversed(list(enumerate(ch_mult))):
            up = nn.Module()
            up.block = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                up.block.append(block(channels, ch * multiple))
                channels = ch * multiple
            if level > 0:
                up.upsample = Upsample3D(channels, compress_time=level >= len(ch_mult) - time_levels)
            levels.append(up)
        self.up = nn.ModuleList(reversed(levels))  # up[i] is the level of ch_mult[i], as in the encoder

        self.norm_out = SpatialNorm3D(channels, z_channels, gather_norm, norm_groups)
        self.conv_out = CausalConv3d(channels, out_ch, 3)
        initialize(self)

    def forward(self, z: Tensor, chunk: Chunk | None = None) -> Tensor:
        """Decode a whole clip at once; `chunk` says otherwise."""
        chunk = chunk or Chunk(lead=z.shape[2] % 2 == 1)
        if not (torch.is_grad_enabled() or self._drops_out):
            return whole.run(self._layers(), self.norm_out, self.conv_out, z, chunk, z)
        h = self.conv_in(z, chunk)
        h = self.mid.block_2(self.mid.block_1(h, chunk, z), chunk, z)
        for level, up in reversed(list(enumerate(self.up))):
            for block in up.block:
                h = run_layer(block, h, chunk, z, recompute=level in self.checkpoint_levels)
            if hasattr(up, "upsample"):
                h = up.upsample(h, chunk)
        return self.conv_out(self.norm_out(h, z, chunk), chunk)

    @property
    def _drops_out(self) -> bool:
        return self.training and self.dropout > 0

    def _layers(self) -> list[whole.Layer]:
        """Return the layers before `norm_out`, in order."""
        up = [layer for level in reversed(self.up) for layer in _layers_of(level)]
        return [self.conv_in, self.mid.block_1, self.mid.block_2, *up]

    def in_pieces(self, z: Tensor, chunk: Chunk, steps: int, room: WaitingRoom) -> Tensor:
        """Return the result of a call, computed by `steps` latent frames at a time.

        See `piecewise`; no gradients are taken.

        Args:
            room: the store of pieces between layers.
        """
        lengths = _lengths(z.shape[2], steps)
        pieces = piecewise.cut(z, lengths, chunk, list(z.split(lengths, dim=2)), room)
        return piecewise.run(self._layers(), self.norm_out, self.conv_out, pieces)

    def piece_bytes(self, z: Tensor, steps: int) -> int:
        """Return an estimate of the bytes of `in_pieces`, without weights and stored pieces."""
        places = z.shape[0] * steps * self.time_factor * z.shape[3] * z.shape[4] * self.space_factor**2
        return piecewise.MAPS * places * self.up[0].block[0].conv1.conv.in_channels * z.element_size()


NEUTRAL = {
    "resamp_with_conv": True,
    "pad_mode": "first",
    "use_linear_attn": False,
    "attn_type": "vanilla",
    "give_pre_end": False,
    "tanh_out": False,
    "add_conv": False,
    "zq_ch": True,
}
"""Other keys of configurations, with the only valid value; for `zq_ch`, whether it equals `z_channels`."""


def _check_neutral(**given: Any) -> None:
    for key, value in given.items():
        if key == "zq_ch" and not value:
            raise UserError("zq_ch: must equal z_channels, since the norms are conditioned on the latent; remove it")
        if value != NEUTRAL[key]:
            raise UserError(f"{key}: {value!r} is not supported; remove it, or set {NEUTRAL[key]!r}")


def _refuse_attention(attn_resolutions: Sequence[int]) -> None:
    if len(attn_resolutions):
        raise UserError(f"attn_resolutions: {list(attn_resolutions)} is not supported; the video autoencoder needs []")


def _layers_of(level: nn.Module) -> list[whole.Layer]:
    """Return the blocks of a level, and the layer that changes the size after them, if any."""
    resampling = (getattr(level, name) for name in ("downsample", "upsample") if hasattr(level, name))
    return [*level.block, *resampling]


def _lengths(frames: int, length: int, less: int = 0) -> list[int]:
    """Return the lengths of pieces of `frames`: `length` each, the first `less` shorter."""
    first = min(length - less, frames)
    whole, rest = divmod(frames - first, length)
    return [first, *[length] * whole, *([rest] if rest else [])]


def _time_levels(compress_times: int, levels: int) -> int:
    """Return the number of levels that halve time."""
    halvings = compress_times.bit_length() - 1
    if compress_times != 2**halvings or halvings >= levels:
        raise UserError(f"temporal_compress_times: {compress_times} is not a power of two up to 2^{levels - 1}")
    return halvings
