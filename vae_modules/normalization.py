"""Group normalization of video, followed by SiLU.

In a decoder, maps from the latent scale and shift the result.
Tensors are (batch, channel, time, height, width) in channels-last memory.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sgm.errors import UserError
from sgm.modules.autoencoding.clip import Chunk
from vae_modules.convolutions import CausalConv3d
from vae_modules.modulation import channel_sums, modulated_silu, write_modulated_silu


class GroupNorm(nn.GroupNorm):
    """Group normalization over space and time, then SiLU.

    Statistics cover this rank's frames, or with `gather_norm` those of all ranks.
    """

    def __init__(self, channels: int, gather_norm: bool = False, groups: int = 32, eps: float = 1e-6):
        if channels % groups:
            raise UserError(f"norm_groups: {groups} groups do not divide the {channels} channels of a level")
        super().__init__(groups, channels, eps)
        self.gather_norm = gather_norm

    def statistics(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        """Return the sums of `x`, of its square and of ones over each group.

        The sums of pieces add up to those of the whole.

        Args:
            offset: (channel,), added to `x` first.

        Returns:
            float64 (3, batch, groups).
        """
        sums = channel_sums(x)
        if offset is not None:
            total, square = sums
            places, offset = x[0, 0].numel(), offset.double()
            sums = torch.stack([total + places * offset, square + offset * (2 * total + places * offset)])
        sums = sums.unflatten(2, (self.num_groups, -1)).sum(3)
        count = sums.new_full((1, *sums.shape[1:]), x[0, : x.shape[1] // self.num_groups].numel())
        return torch.cat([sums, count])

    def modulation(
        self, statistics: Tensor, dtype: torch.dtype, chunk: Chunk, *, offset: Tensor | None = None
    ) -> tuple[Any, ...]:
        """Return the arguments of `write_modulated_silu` that normalize.

        The arguments are a scale and a shift, each (batch, channel, 1, 1, 1), and whether a first frame has its own.

        Args:
            statistics: of everything that is normalized together, on all ranks.
            dtype: of the tensor to normalize; the maps are float32 or wider.
            chunk: without effect; norms with maps need it.
            offset: (channel,), added to the tensor first.
        """
        total, square, count = statistics
        mean = total / count
        variance = (square / count - mean.square()).clamp_min(0)
        per_group = self.num_channels // self.num_groups
        scale = self.weight * torch.rsqrt(variance + self.eps).repeat_interleave(per_group, dim=1)
        mean = mean.repeat_interleave(per_group, dim=1)
        shift = self.bias - scale * (mean if offset is None else mean - offset)
        wide = torch.promote_types(dtype, torch.float32)
        return scale.to(wide)[:, :, None, None, None], shift.to(wide)[:, :, None, None, None], False

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Return silu(norm(x)), shaped like x (batch, channel, time, height, width).

        `chunk` adds up the statistics of ranks.
        """
        return modulated_silu(x, *self.modulation(chunk.total(self.statistics(x), self.gather_norm), x.dtype, chunk))


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

    def statistics(self, f: Tensor, offset: Tensor | None = None) -> Tensor:
        """Return the sums of `f`; see `GroupNorm.statistics`."""
        return self.norm_layer.statistics(f, offset)

    def modulation(
        self, statistics: Tensor, dtype: torch.dtype, chunk: Chunk, z: Tensor, *, offset: Tensor | None = None
    ) -> tuple[Any, ...]:
        """Return the arguments of `write_modulated_silu`; see `GroupNorm.modulation`.

        The arguments are maps (batch, channel, t, h, w) shaped like `z`, and the scale and shift of the normalization.
        """
        scale, shift, _ = self.norm_layer.modulation(statistics, dtype, chunk, offset=offset)
        return self.conv_y(z, chunk), self.conv_b(z, chunk), chunk.lead, scale, shift

    def forward(self, f: Tensor, z: Tensor, chunk: Chunk) -> Tensor:
        """Return the normalized f (batch, channel, T, H, W).

        Args:
            z: the latent (batch, latent_channel, t, h, w) of the same frames.
        """
        statistics = chunk.total(self.statistics(f), self.gather_norm)
        y, b, lead, scale, shift = self.modulation(statistics, f.dtype, chunk, z)
        # Pointwise maps commute with nearest resizing, so that all but one multiply-add is at z's resolution.
        return modulated_silu(f, scale * y, shift * y + b, lead)


Norm = GroupNorm | SpatialNorm3D


def normalize_and_convolve(
    norm: Norm,
    conv: CausalConv3d,
    held: list[Tensor],
    chunk: Chunk,
    *z: Tensor,
    statistics: Tensor | None = None,
    offset: Tensor | None = None,
    overwrite: bool = False,
    biased: bool = True,
) -> Tensor:
    """Return conv(norm(x)), without gradients.

    Args:
        held: a list with `x`, which is removed as soon as it is not needed, so that the convolution may use its memory.
        z: the latent, for a norm that is conditioned on it.
        statistics: of everything that is normalized together, if that is more than `x`.
        offset: (channel,), added to `x` first.
        overwrite: the caller does not need `x`, and its memory may be overwritten.
        biased: add the bias of the convolution.
    """
    x = held.pop()
    if statistics is None:
        statistics = chunk.total(norm.statistics(x, offset), norm.gather_norm)
    modulation = norm.modulation(statistics, x.dtype, chunk, *z, offset=offset)
    if not conv.gains_by_buffer(x):
        h = x if overwrite else torch.empty_like(x)
        write_modulated_silu(h, x, *modulation)
        del x
        return conv.forward_over(h, chunk, biased)
    before = conv.conv.kernel_size[0] - 1
    shape = (x.shape[0], x.shape[1], before + x.shape[2], *x.shape[3:])
    buffer = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    tail = None
    if chunk.copies_tail(x.shape[2], before):
        tail = torch.empty_like(buffer[:, :, :before], memory_format=torch.channels_last_3d)
    write_modulated_silu(buffer[:, :, before:], x, *modulation, tail=tail)
    del x
    return conv.convolve_buffer(buffer, chunk, biased, tail)
