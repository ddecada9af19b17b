"""Group normalization of video, followed by SiLU.

In a decoder, maps from the latent scale and shift the result.
Tensors are (batch, channel, time, height, width) in channels-last memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sgm.errors import UserError
from sgm.modules.autoencoding.clip import Chunk
from vae_modules.convolutions import CausalConv3d
from vae_modules.passes.channel_sums import channel_sums
from vae_modules.passes.latent_maps import LatentMaps
from vae_modules.passes.modulation import modulated_silu, write_modulated_silu
from vae_modules.passes.pieces_in_cache import empty_channels_last
from vae_modules.passes.products import Product, written
from vae_modules.summands import Summands


class Modulation(NamedTuple):
    """The scale and shift of a norm, as arguments of `write_modulated_silu`.

    Attributes:
        scale, shift: (batch, channel, time, 1, 1).
        lead: the first frame has a scale and a shift of its own.
        maps: applied next, in a decoder.
    """

    scale: Tensor
    shift: Tensor
    lead: bool
    maps: LatentMaps | None = None


class GroupNorm(nn.GroupNorm):
    """Group normalization over space and time, then SiLU.

    Statistics cover this rank's frames, or with `gather_norm` those of all ranks.
    """

    def __init__(self, channels: int, gather_norm: bool = False, groups: int = 32, eps: float = 1e-6):
        if channels % groups:
            raise UserError(f"norm_groups: {groups} groups do not divide the {channels} channels of a level")
        super().__init__(groups, channels, eps)
        self.gather_norm = gather_norm

    def statistics(self, sums: Tensor, places: Sequence[int], offset: Tensor | None = None) -> Tensor:
        """Return the sums of a tensor, of its square and of ones over each group.

        The sums of pieces add up to those of the whole.

        Args:
            sums: of each channel, (2, batch, part, channel), for each part that is normalized by itself.
            places: number of places of each part.
            offset: (channel,), added to the tensor first.

        Returns:
            float64 (3, batch, part, groups).
        """
        count = torch.cat([sums.new_full((1,), each) for each in places])[:, None]  # no copy that waits for a GPU
        if offset is not None:
            total, square = sums
            offset = offset.double()
            sums = torch.stack([total + count * offset, square + offset * (2 * total + count * offset)])
        sums = sums.unflatten(3, (self.num_groups, -1)).sum(4)
        per_group = self.num_channels // self.num_groups
        return torch.cat([sums, (per_group * count).expand(1, *sums.shape[1:])])

    def modulation(
        self, statistics: Tensor, dtype: torch.dtype, chunk: Chunk, *, offset: Tensor | None = None
    ) -> Modulation:
        """Return the modulation that normalizes.

        Its time is 1, or with several parts the latent frames of the chunk.

        Args:
            statistics: of everything that is normalized together, on all ranks.
            dtype: of the tensor to normalize; the maps are float32 or wider.
            offset: (channel,), added to the tensor first.
        """
        total, square, count = statistics
        mean = total / count
        variance = (square / count - mean.square()).clamp_min(0)
        per_group = self.num_channels // self.num_groups
        scale = self.weight * torch.rsqrt(variance + self.eps).repeat_interleave(per_group, dim=2)
        mean = mean.repeat_interleave(per_group, dim=2)
        shift = self.bias - scale * (mean if offset is None else mean - offset)
        wide = torch.promote_types(dtype, torch.float32)

        def of_frames(each: Tensor) -> Tensor:
            each = each.to(wide).transpose(1, 2)  # batch, channel, part
            if len(chunk.parts) > 1:
                each = torch.cat(
                    [part.expand(-1, -1, n) for part, n in zip(each.split(1, 2), chunk.parts, strict=True)], dim=2
                )
            return each[..., None, None]

        return Modulation(of_frames(scale), of_frames(shift), chunk.lead and len(chunk.parts) > 1)

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Return silu(norm(x)), shaped like x (batch, channel, time, height, width).

        `chunk` adds up the statistics of ranks.
        """
        modulation = self.modulation(self._own_statistics(x, chunk), x.dtype, chunk)
        return modulated_silu(x, modulation.scale, modulation.shift, modulation.lead)

    def _own_statistics(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Return the statistics that normalize `x`."""
        parts = x.split(chunk.lengths(x.shape[2]), dim=2)
        sums = torch.stack([channel_sums(part) for part in parts], dim=2)
        return chunk.total(self.statistics(sums, [part[0, 0].numel() for part in parts]), self.gather_norm)


class SpatialNorm3D(nn.Module):
    """Group normalization with maps from the latent, then SiLU.

    GroupNorm(f) * conv_y(z) + conv_b(z); Zheng et al., "MoVQ: Modulating Quantized Vectors for High-Fidelity Image
    Generation", eq. 4.
    """

    def __init__(self, channels: int, latent_channels: int, gather_norm: bool = False, groups: int = 32):
        super().__init__()
        self.norm_layer = GroupNorm(channels, gather_norm, groups)
        self.conv_y = CausalConv3d(latent_channels, channels, 1)
        self.conv_b = CausalConv3d(latent_channels, channels, 1)

    @property
    def gather_norm(self) -> bool:
        """Return whether statistics cover the frames of all ranks."""
        return self.norm_layer.gather_norm

    def statistics(self, sums: Tensor, places: Sequence[int], offset: Tensor | None = None) -> Tensor:
        """Return the sums over groups; see `GroupNorm.statistics`."""
        return self.norm_layer.statistics(sums, places, offset)

    def modulation(
        self, statistics: Tensor, dtype: torch.dtype, chunk: Chunk, z: Tensor, *, offset: Tensor | None = None
    ) -> Modulation:
        """Return the modulation that normalizes, with maps from the latent `z`."""
        y, b = self.conv_y.conv, self.conv_b.conv
        tensors = z, y.weight.flatten(1), y.bias, b.weight.flatten(1), b.bias
        same = torch.promote_types(z.dtype, y.weight.dtype)  # they differ under autocast
        maps = LatentMaps(*(each.to(same) for each in tensors))
        return self.norm_layer.modulation(statistics, dtype, chunk, offset=offset)._replace(lead=chunk.lead, maps=maps)

    def forward(self, f: Tensor, z: Tensor, chunk: Chunk) -> Tensor:
        """Return the normalized f (batch, channel, T, H, W).

        Args:
            z: the latent (batch, latent_channel, t, h, w) of the same frames.
        """
        statistics = self.norm_layer._own_statistics(f, chunk)
        scale, shift, *_ = self.norm_layer.modulation(statistics, f.dtype, chunk)
        # Pointwise maps commute with nearest resizing, so that all but one multiply-add is at z's resolution.
        y = self.conv_y(z, chunk)
        return modulated_silu(f, scale * y, shift * y + self.conv_b(z, chunk), chunk.lead)


Norm = GroupNorm | SpatialNorm3D


def normalize_and_convolve(
    norm: Norm,
    conv: CausalConv3d,
    held: list[Summands],
    chunk: Chunk,
    *z: Tensor,
    statistics: Tensor | None = None,
    overwrite: bool = False,
    biased: bool = True,
) -> Tensor:
    """Return conv(norm(sum)), without gradients.

    Args:
        held: a list with the summands, which are removed as soon as they are not needed, so that the convolution may
            use their memory.
        z: the latent, for a norm that is conditioned on it.
        statistics: of everything that is normalized together, if that is more than the sum.
        overwrite: the caller does not need the sum, and its memory may be overwritten.
        biased: add the bias of the convolution.
    """
    summands = held.pop()
    if statistics is None:
        statistics = statistics_of(summands, norm, chunk)
    x, frames = summands.x, summands.frames
    modulation = norm.modulation(statistics, x.dtype, chunk, *z, offset=summands.offset)
    shape = (*x.shape[:2], frames, *x.shape[3:])
    if not conv.gains_by_buffer(x, frames):
        h = x if overwrite and not summands.repeats and isinstance(x, Tensor) else empty_channels_last(x, shape)
        _write_normalized(h, x, modulation)
        del x, summands
        return conv.forward_over(h, chunk, biased)
    before = conv.conv.kernel_size[0] - 1
    buffer = empty_channels_last(x, (*shape[:2], before + frames, *shape[3:]))
    tail = None
    if chunk.copies_tail(frames, before):
        tail = torch.empty_like(buffer[:, :, :before], memory_format=torch.channels_last_3d)
    _write_normalized(buffer[:, :, before:], x, modulation, tail)
    del x, summands
    return conv.convolve_buffer(buffer, chunk, biased, tail)


def statistics_of(summands: Summands, norm: Norm, chunk: Chunk) -> Tensor:
    """Return the statistics that normalize a sum, which is taken in the same pass."""
    return chunk.total(own_statistics(summands, norm, chunk), norm.gather_norm)


def own_statistics(summands: Summands, norm: Norm, chunk: Chunk) -> Tensor:
    """Return the statistics of a sum, which is taken in the same pass, on this rank."""
    sums = summands.sums(chunk)
    return norm.statistics(sums, summands.places(chunk), summands.offset)


def _write_normalized(out: Tensor, x: Tensor | Product, modulation: Modulation, tail: Tensor | None = None) -> None:
    scale, shift, lead, maps = modulation
    if isinstance(x, Product) and tail is None and scale.shape[2] == 1 and maps is None:
        x.write_modulated_silu(out, scale, shift)
    else:
        write_modulated_silu(out, written(x), scale, shift, lead, maps, tail)
