"""Layers of the causal video autoencoder, on channels-last video tensors.

Tensors are (batch, channel, time, height, width).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.errors import UserError
from sgm.modules.autoencoding.clip import Chunk
from vae_modules import winograd
from vae_modules.modulation import (
    add_in_place,
    channel_sums,
    modulated_silu,
    write_modulated_silu,
)

FEW = 4  # oneDNN has no float32 3D convolution for fewer channels

# ---------------------------------------------------------------- convolution


def leaves_bias(weight: Tensor) -> bool:
    """Return whether a convolution with this weight leaves its bias to the next operation.

    The result is true on a GPU without gradients, where PyTorch adds the bias in another pass over the
    result; on a CPU PyTorch adds the bias within the convolution.
    """
    return weight.device.type != "cpu" and not torch.is_grad_enabled()


def left_bias(conv: nn.Conv2d | nn.Conv3d) -> Tensor | None:
    """Return the bias (channel,) that a convolution leaves to the next operation, or None."""
    return conv.bias if leaves_bias(conv.weight) else None


def run_and_leave_bias(
    layer: "CausalConv3d | Downsample3D | Upsample3D", x: Tensor, chunk: Chunk
) -> tuple[Tensor, Tensor | None]:
    """Return layer(x, chunk), and the bias (channel,) that must still be added, or None."""
    left = left_bias(layer.conv)
    return layer(x, chunk, biased=left is None), left


class CausalConv3d(nn.Module):
    """A 3D convolution that only sees the present and earlier frames.

    The frames before the clip are copies of its first frame. Space is padded with zeros; time, height and width keep
    their sizes.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size)

    def forward(self, x: Tensor, chunk: Chunk, biased: bool = True) -> Tensor:
        """Return the convolution of `x` (batch, channel, time, height, width).

        `chunk` has the frames before `x`.
        """
        weight, bias = self.conv.weight, self.conv.bias if biased else None
        time, height, width = self.conv.kernel_size
        padding = (0, height // 2, width // 2)
        if time == 1:
            return _pointwise_in_time(self.conv, x, biased)
        before = chunk.frames_before(self, x, time - 1)
        if x.shape[2] == 0:  # a rank without frames: no output, but a node in the graph for the frames that it sent
            return F.conv3d(F.pad(before, (0, 0, 0, 0, 0, 1)), weight, bias, padding=padding)[:, :, :0]
        if before is None and x.shape[2] == 1 and x.dtype == torch.float32:  # all taps see the same frame
            return F.conv3d(x, weight.sum(2, keepdim=True), bias, padding=padding)
        if winograd.serves(x, weight):
            return winograd.causal_conv3d(before, x, weight, bias)
        if before is None:
            before = x[:, :, :1].expand(-1, -1, time - 1, -1, -1)
        frames = torch.cat([before, x], dim=2)
        if x.device.type == "cpu" and x.dtype == torch.float32 and self.conv.in_channels < FEW:
            return _with_time_in_channels(self.conv, frames, biased)
        return F.conv3d(frames, weight, bias, padding=padding)

    def forward_over(self, x: Tensor, chunk: Chunk, biased: bool = True) -> Tensor:
        """Return the result of a call, without gradients; `x` may be overwritten."""
        # Frames that are being sent to another rank must not change.
        if chunk.group is None and x.shape[2] > 1 and winograd.serves(x, self.conv.weight):
            before = chunk.frames_before(self, x, self.conv.kernel_size[0] - 1)
            return winograd.overwriting_conv3d(before, x, self.conv.weight, self.conv.bias if biased else None)
        return self(x, chunk, biased)

    def takes_room(self, x: Tensor) -> bool:
        """Return whether `after` supports `x`, and saves a copy; only without gradients."""
        same = x.shape[2] == 1 and x.dtype == torch.float32  # `forward` is faster for a single frame
        return not (torch.is_grad_enabled() or x.shape[2] == 0 or same or winograd.serves(x, self.conv.weight))

    def after(self, room: Tensor, chunk: Chunk, biased: bool = True, tail: Tensor | None = None) -> Tensor:
        """Return the convolution of all but the first `kernel - 1` frames of `room`.

        The content of these first frames is replaced by the frames before.

        Args:
            tail: a copy of the last `kernel - 1` frames, or None; see `Chunk.copies_tail`.
        """
        time, height, width = self.conv.kernel_size
        x = room[:, :, time - 1 :]
        before = chunk.frames_before(self, x, time - 1, tail)
        room[:, :, : time - 1] = x[:, :, :1] if before is None else before
        bias = self.conv.bias if biased else None
        return F.conv3d(room, self.conv.weight, bias, padding=(0, height // 2, width // 2))


# ---------------------------------------------------------------- normalization


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

    def passes(
        self, statistics: Tensor, dtype: torch.dtype, chunk: Chunk, *, offset: Tensor | None = None
    ) -> tuple[Any, ...]:
        """Return the arguments of `write_modulated_silu` that normalize.

        The arguments are a scale and a shift, each (batch, channel, 1, 1, 1), and whether a first frame has its own.

        Args:
            statistics: of everything that is normalized together, on all ranks.
            dtype: of the tensor to normalize; the maps are float32 or wider.
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
        return modulated_silu(x, *self.passes(chunk.total(self.statistics(x), self.gather_norm), x.dtype, chunk))


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
        return self.norm_layer.gather_norm

    def statistics(self, f: Tensor, offset: Tensor | None = None) -> Tensor:
        """Return the sums of `f`; see `GroupNorm.statistics`."""
        return self.norm_layer.statistics(f, offset)

    def passes(
        self, statistics: Tensor, dtype: torch.dtype, chunk: Chunk, z: Tensor, *, offset: Tensor | None = None
    ) -> tuple[Any, ...]:
        """Return the arguments of `write_modulated_silu`; see `GroupNorm.passes`.

        The arguments are maps (batch, channel, t, h, w) shaped like `z`, and the scale and shift of the normalization.
        """
        scale, shift, _ = self.norm_layer.passes(statistics, dtype, chunk, offset=offset)
        return self.conv_y(z, chunk), self.conv_b(z, chunk), chunk.lead, scale, shift

    def forward(self, f: Tensor, z: Tensor, chunk: Chunk) -> Tensor:
        """Return the normalized f (batch, channel, T, H, W).

        Args:
            z: the latent (batch, latent_channel, t, h, w) of the same frames.
        """
        statistics = chunk.total(self.statistics(f), self.gather_norm)
        y, b, lead, scale, shift = self.passes(statistics, f.dtype, chunk, z)
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
    passes = norm.passes(statistics, x.dtype, chunk, *z, offset=offset)
    if not conv.takes_room(x):
        h = x if overwrite else torch.empty_like(x)
        write_modulated_silu(h, x, *passes)
        del x
        return conv.forward_over(h, chunk, biased)
    before = conv.conv.kernel_size[0] - 1
    shape = (x.shape[0], x.shape[1], before + x.shape[2], *x.shape[3:])
    room = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    tail = None
    if chunk.copies_tail(x.shape[2], before):
        tail = torch.empty_like(room[:, :, :before], memory_format=torch.channels_last_3d)
    write_modulated_silu(room[:, :, before:], x, *passes, tail=tail)
    del x
    return conv.after(room, chunk, biased, tail)


# ---------------------------------------------------------------- blocks


class ResnetBlock3D(nn.Module):
    """Two rounds of norm, SiLU and causal convolution, with a shortcut.

    In a decoder the norms are conditioned on the latent.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        latent_channels: int | None = None,
        gather_norm: bool = False,
        norm_groups: int = 32,
    ):
        super().__init__()

        def norm(channels: int) -> nn.Module:
            if latent_channels is None:
                return GroupNorm(channels, gather_norm, norm_groups)
            return SpatialNorm3D(channels, latent_channels, gather_norm, norm_groups)

        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3)
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, chunk: Chunk, z: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
        """Return the block's output for `x`.

        Args:
            offset: (channel,), added to `x` first; see `left_bias`.
        """
        condition = () if z is None else (z,)
        if torch.is_grad_enabled() or (self.training and self.dropout.p):
            x = x if offset is None else x + offset[:, None, None, None]
            h = self.conv1(self.norm1(x, *condition, chunk), chunk)
            h = self.conv2(self.dropout(self.norm2(h, *condition, chunk)), chunk)
            return self.shortcut(x) + h
        held = [self.first_round([x], chunk, *condition, offset=offset)]
        h = self.second_round(held, chunk, *condition)
        return self.add_shortcut(h, self.shortcut(x, biased=False), offset)

    def first_round(
        self,
        held: list[Tensor],
        chunk: Chunk,
        *z: Tensor,
        statistics: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        """Return the first norm and convolution of `held`, without a left bias.

        See `normalize_and_convolve`.
        """
        biased = left_bias(self.conv1.conv) is None
        return normalize_and_convolve(
            self.norm1, self.conv1, held, chunk, *z, statistics=statistics, offset=offset, biased=biased
        )

    def second_round(self, held: list[Tensor], chunk: Chunk, *z: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Return the second norm and convolution of `first_round`'s result, without a left bias."""
        return normalize_and_convolve(
            self.norm2,
            self.conv2,
            held,
            chunk,
            *z,
            statistics=statistics,
            offset=left_bias(self.conv1.conv),
            overwrite=True,
            biased=left_bias(self.conv2.conv) is None,
        )

    def add_shortcut(self, h: Tensor, shortcut: Tensor, offset: Tensor | None) -> Tensor:
        """Return the output from those of `second_round` and `shortcut`, in the memory of `h`.

        Args:
            offset: of the input, see `forward`.
        """
        left = left_bias(self.conv2.conv)
        if hasattr(self, "nin_shortcut"):
            if offset is not None:  # through the shortcut's product
                offset = self.nin_shortcut.weight[:, :, 0, 0, 0] @ offset
            left = left if left is None else left + self.nin_shortcut.bias
        if offset is not None:
            left = offset if left is None else left + offset
        return add_in_place(h, shortcut, left)

    def shortcut(self, x: Tensor, biased: bool = True) -> Tensor:
        """Return the tensor that is added to the result: `x`, or `x` with the result's channels.

        Args:
            biased: add the shortcut's bias, even if it may be left to `add_shortcut`.
        """
        if not hasattr(self, "nin_shortcut"):
            return x
        return _pointwise_in_time(self.nin_shortcut, x, biased or left_bias(self.conv2.conv) is None)


class Downsample3D(nn.Module):
    """Halve height and width by a strided convolution, and optionally time by averaging pairs."""

    def __init__(self, channels: int, compress_time: bool):
        super().__init__()
        self.compress_time = compress_time
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor, chunk: Chunk, biased: bool = True) -> Tensor:
        if not torch.is_grad_enabled():
            weight, bias = self.conv.weight, self.conv.bias if biased else None
            padded = self._halved_in_time_and_padded(x, int(chunk.lead))
            return _framewise(lambda frames: F.conv2d(frames, weight, bias, stride=2), padded)
        if self.compress_time:
            lead = int(chunk.lead)
            pairs = 0.5 * (x[:, :, lead::2] + x[:, :, lead + 1 :: 2])
            x = torch.cat([x[:, :, :1], pairs], dim=2) if lead else pairs
        return _framewise(lambda frames: self.conv(F.pad(frames, (0, 1, 0, 1))), x)

    def _halved_in_time_and_padded(self, x: Tensor, lead: int) -> Tensor:
        """Return the convolution's input, with a row and a column of zeros, written once."""
        batch, channels, time, height, width = x.shape
        frames = lead + (time - lead) // 2 if self.compress_time else time
        shape = (batch, channels, frames, height + 1, width + 1)
        padded = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        padded[..., -1, :].zero_()
        padded[..., -1].zero_()
        inner = padded[..., :-1, :-1]
        if not self.compress_time:
            inner.copy_(x)
            return padded
        inner[:, :, :lead] = x[:, :, :lead]
        if frames > lead:
            torch.lerp(x[:, :, lead::2], x[:, :, lead + 1 :: 2], 0.5, out=inner[:, :, lead:])
        return padded


class Upsample3D(nn.Module):
    """Double height, width and optionally time by nearest neighbour; convolve each frame."""

    def __init__(self, channels: int, compress_time: bool):
        super().__init__()
        self.compress_time = compress_time
        self.conv = nn.Conv2d(channels, channels, kernel_size=3)

    def forward(self, x: Tensor, chunk: Chunk, biased: bool = True) -> Tensor:
        x = _framewise(partial(self._double_and_convolve, bias=self.conv.bias if biased else None), x)
        if self.compress_time:  # after the convolution, which would give equal results for equal frames
            lead = int(chunk.lead)
            first, rest = x[:, :, :lead], x[:, :, lead:]
            if not torch.is_grad_enabled():
                return _doubled_in_time(first, rest)
            doubled = rest.unsqueeze(3).expand(-1, -1, -1, 2, -1, -1).flatten(2, 3)
            x = torch.cat([first, doubled], dim=2)
        return x

    def _double_and_convolve(self, frames: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.conv.weight
        if frames.device.type != "cpu" or frames.dtype != torch.float32:  # the method below is inexact or slower
            return F.conv2d(F.interpolate(frames, scale_factor=2, mode="nearest"), weight, bias, padding=1)
        # A 3x3 kernel sees only 2x2 different pixels of a doubled image. With the sums of the taps for a pixel it is a
        # transposed convolution of the small image, with 4 instead of 9 products per pixel.
        kernel = _overlapping_sums(_overlapping_sums(weight, dim=2), dim=3).transpose(0, 1).flip(2, 3)
        return F.conv_transpose2d(frames, kernel, bias, stride=2, padding=1)


def _doubled_in_time(first: Tensor, rest: Tensor) -> Tensor:
    """Return the frames of `first`, and each frame of `rest` twice, written once."""
    shape = (*first.shape[:2], first.shape[2] + 2 * rest.shape[2], *first.shape[3:])
    out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=torch.channels_last_3d)
    out[:, :, : first.shape[2]] = first
    out[:, :, first.shape[2] :].unflatten(2, (rest.shape[2], 2)).copy_(rest.unsqueeze(3))
    return out


def _overlapping_sums(kernel: Tensor, dim: int) -> Tensor:
    """Return the taps (a, b, c) along `dim` as (a, a + b, b + c, c), for doubled rows."""
    before = torch.cat([kernel, kernel.narrow(dim, 0, 1) * 0], dim)
    return before + before.roll(1, dim)


def _with_time_in_channels(conv: nn.Conv3d, frames: Tensor, biased: bool) -> Tensor:
    """Apply a convolution without padding in time as a 2D convolution.

    The images have the channels of all frames that the kernel sees.
    """
    time, height, width = conv.kernel_size
    count = frames.shape[2] - time + 1
    seen = torch.cat([frames[:, :, tap : tap + count] for tap in range(time)], dim=1)
    seen = seen.contiguous(memory_format=torch.channels_last_3d)
    kernel = conv.weight.transpose(1, 2).flatten(1, 2)
    bias = conv.bias if biased else None
    return _framewise(lambda x: F.conv2d(x, kernel, bias, padding=(height // 2, width // 2)), seen)


def _pointwise_in_time(conv: nn.Conv3d, x: Tensor, biased: bool = True) -> Tensor:
    """Apply a convolution of length 1 in time.

    Unlike a 3D convolution it also supports an input without frames.
    """
    if biased and conv.kernel_size == (1, 1, 1) and leaves_bias(conv.weight):
        # A matrix product adds the bias while writing its result.
        return F.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias).movedim(-1, 1)
    padding = [size // 2 for size in conv.kernel_size[1:]]
    bias = conv.bias if biased else None
    return _framewise(lambda frames: F.conv2d(frames, conv.weight[:, :, 0], bias, padding=padding), x)


def _framewise(operation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an image operation to every frame of `x`."""
    batch, time = x.shape[0], x.shape[2]
    y = operation(x.transpose(1, 2).flatten(0, 1))  # b c t h w -> (b t) c h w
    return y.unflatten(0, (batch, time)).transpose(1, 2)
