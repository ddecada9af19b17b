"""The VAE's passes over large tensors on a GPU, each reading and writing them once.

The kernels are written in Triton. Tensors are (batch, channel, time, height, width) in channels-last memory, where
every place is a row of channels. If Triton is missing or fails, `serve` returns False, and `modulation` computes the
same in several passes.
"""

import functools
import logging

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # on a CPU, or Windows
    triton = None

logger = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
IN_HAND = 4096  # values that a program keeps in registers at once
PLACES_EACH = 2048  # places that a program sums in float32; their sums are added in float64
WIDEST = 2048  # channels

if triton is not None:

    @triton.jit
    def _sums_kernel(  # type: ignore[no-untyped-def]
        x,
        other,
        offset,
        partial,
        rows,
        channels,
        x_batch,
        other_batch,
        ADD: tl.constexpr,
        OFFSET: tl.constexpr,
        CHANNELS: tl.constexpr,
        ROWS: tl.constexpr,
        ROWS_EACH: tl.constexpr,
    ):
        """Sum rows and their squares.

        With ADD the rows of `other` are added to those of `x` first, with OFFSET also a number for each channel.
        """
        block, batch = tl.program_id(0), tl.program_id(1)
        channel = tl.arange(0, CHANNELS)
        total = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
        square = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
        added = tl.zeros((CHANNELS,), dtype=tl.float32)
        if OFFSET:
            added = tl.load(offset + channel, mask=channel < channels, other=0.0).to(tl.float32)
        for start in range(0, ROWS_EACH, ROWS):
            row = block.to(tl.int64) * ROWS_EACH + start + tl.arange(0, ROWS)
            mask = (row < rows)[:, None] & (channel < channels)[None, :]
            offsets = row[:, None] * channels + channel[None, :]
            place = x + batch.to(tl.int64) * x_batch + offsets
            value = tl.load(place, mask=mask, other=0.0)
            if ADD:
                more = tl.load(other + batch.to(tl.int64) * other_batch + offsets, mask=mask, other=0.0)
                both = value.to(tl.float32) + more.to(tl.float32) + added[None, :]
                value = tl.where(mask, both, 0.0).to(value.dtype)
                tl.store(place, value, mask=mask)
            wide = value.to(tl.float32)
            total += wide
            square += wide * wide
        to = partial + (batch.to(tl.int64) * tl.num_programs(0) + block) * channels + channel
        tl.store(to, tl.sum(total, axis=0), mask=channel < channels)
        half = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * channels
        tl.store(to + half, tl.sum(square, axis=0), mask=channel < channels)

    @triton.jit
    def _modulated_silu_kernel(  # type: ignore[no-untyped-def]
        out,
        tail,
        x,
        scale,
        shift,
        outer_scale,
        outer_shift,
        channels,
        frames,
        height,
        width,
        out_batch,
        tail_batch,
        tail_frames,
        x_batch,
        map_batch,
        map_channel,
        map_frame,
        map_row,
        map_column,
        alone,
        per_frame,
        per_row,
        per_column,
        OUTER: tl.constexpr,
        TAIL: tl.constexpr,
        CHANNELS: tl.constexpr,
        PLACES: tl.constexpr,
    ):
        """Write silu(x * scale + shift) for some places of a row of an image.

        With OUTER, another scale and shift per channel apply first; with TAIL the last frames are also written to
        `tail`.
        """
        line = tl.program_id(0).to(tl.int64)  # counts all rows of all frames of all clips
        row, frame, batch = line % height, line // height % frames, line // height // frames
        column = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
        channel = tl.arange(0, CHANNELS)
        mask = (column < width)[:, None] & (channel < channels)[None, :]
        step = tl.where(frame < alone, frame, alone + (frame - alone) // per_frame)
        at = batch * map_batch + step * map_frame + row // per_row * map_row
        maps = at + (column // per_column)[:, None] * map_column + channel[None, :] * map_channel
        factor = tl.load(scale + maps, mask=mask, other=0.0).to(tl.float32)
        summand = tl.load(shift + maps, mask=mask, other=0.0).to(tl.float32)
        if OUTER:
            inside = channel < channels
            first = tl.load(outer_shift + batch * channels + channel, mask=inside, other=0.0)
            summand += first[None, :] * factor
            factor *= tl.load(outer_scale + batch * channels + channel, mask=inside, other=0.0)[None, :]
        offsets = ((frame * height + row) * width + column)[:, None] * channels + channel[None, :]
        value = tl.load(x + batch * x_batch + offsets, mask=mask, other=0.0).to(tl.float32)
        value = value * factor + summand
        value = value / (1.0 + tl.exp(-value))
        result = value.to(out.dtype.element_ty)
        tl.store(out + batch * out_batch + offsets, result, mask=mask)
        if TAIL:
            in_tail = frame - frames + tail_frames
            offsets = ((in_tail * height + row) * width + column)[:, None] * channels + channel[None, :]
            tl.store(tail + batch * tail_batch + offsets, result, mask=mask & (in_tail >= 0))


def channel_sums(x: Tensor) -> Tensor:
    """Return the sums of `x` and of its square over space and time.

    Returns:
        float64 (2, batch, channel).
    """
    return _launch_sums(x, None)


def add_and_sum(x: Tensor, other: Tensor, offset: Tensor | None = None) -> Tensor:
    """Add `other` and `offset` (channel,) to `x` in place; return the result's `channel_sums`."""
    return _launch_sums(x, other, offset)


def write_modulated_silu(
    out: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    lead: bool,
    before: tuple[Tensor, Tensor] | None = None,
    tail: Tensor | None = None,
) -> None:
    """Write silu(x * scale + shift) into `out`; see `modulation.write_modulated_silu`."""
    batch, channels, frames, height, width = x.shape
    if shift.stride() != scale.stride():
        scale, shift = scale.contiguous(), shift.contiguous()
    alone = int(lead and frames > 1)
    steps, rows, columns = scale.shape[2:]
    at_once = triton.next_power_of_2(channels)
    places = max(IN_HAND // at_once, 1)
    grid = batch * frames * height, triton.cdiv(width, places)
    with torch.cuda.device_of(x):
        _modulated_silu_kernel[grid](
            out,
            out if tail is None else tail,
            x,
            scale,
            shift,
            *(each.flatten() for each in before or (scale, shift)),
            channels,
            frames,
            height,
            width,
            out.stride(0),
            0 if tail is None else tail.stride(0),
            0 if tail is None else tail.shape[2],
            x.stride(0),
            *(0 if size == 1 else stride for size, stride in zip(scale.shape, scale.stride(), strict=True)),
            alone,
            max((frames - alone) // max(steps - alone, 1), 1),
            height // rows,
            width // columns,
            OUTER=before is not None,
            TAIL=tail is not None,
            CHANNELS=at_once,
            PLACES=places,
        )


def serve(*tensors: Tensor) -> bool:
    """Return whether the kernels support these tensors.

    The tensors must be on a GPU, with rows of channels one after the other.
    """
    first = tensors[0]
    return (
        first.device.type == "cuda"
        and all(x.dtype == first.dtype and x.numel() > 0 and _is_dense(x) for x in tensors)
        and first.dtype in DTYPES
        and first.shape[1] <= WIDEST
        and works()
    )


@functools.cache
def works() -> bool:
    """Return whether the kernels give the results of PyTorch on this machine.

    The kernels are tried once, and a failure is logged.
    """
    if triton is None:
        return False
    try:
        _try_out()
    except Exception as error:  # Triton, its compiler or the driver raises many kinds
        reason = str(error).strip().partition("\n")[0]
        logger.warning("the VAE runs without its own GPU kernels, which fail on this machine: %s", reason)
        return False
    return True


def _try_out(device: str = "cuda") -> None:
    """Check that the kernels agree with PyTorch on small tensors.

    Raises:
        ArithmeticError: the results differ.
    """
    own = torch.Generator(device).manual_seed(0)  # the global generators stay untouched

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=own, device=device)

    x, other = (drawn(2, 3, 6, 5, 48).permute(0, 4, 1, 2, 3) for _ in range(2))
    scale, shift = (drawn(2, 48, 2, 3, 5) for _ in range(2))
    first_scale, first_shift = (drawn(2, 48, 1, 1, 1) for _ in range(2))
    factor, summand = (
        torch.cat([m[:, :, :1], m[:, :, 1:], m[:, :, 1:]], 2).repeat_interleave(2, 3) for m in (scale, shift)
    )
    expected, out = torch.nn.functional.silu(x * factor + summand), torch.empty_like(x)
    write_modulated_silu(out, x, scale, shift, True)
    normed_expected = torch.nn.functional.silu((x * first_scale + first_shift) * factor + summand)
    normed_out = torch.empty_like(x)
    tail = torch.empty_like(x[:, :, :2], memory_format=torch.channels_last_3d)
    write_modulated_silu(normed_out, x, scale, shift, True, (first_scale, first_shift), tail)
    offset = drawn(48)
    total, shifted = x + other, x + other + offset[:, None, None, None]
    sums, shifted_sums = (
        torch.stack([each.double().sum((2, 3, 4)), each.double().square().sum((2, 3, 4))]) for each in (total, shifted)
    )
    with_offset = x.clone()
    found, shifted_found = add_and_sum(x, other), add_and_sum(with_offset, other, offset)
    pairs = [(out, expected), (normed_out, normed_expected), (x, total), (found, sums), (channel_sums(x), sums)]
    pairs += [(with_offset, shifted), (shifted_found, shifted_sums), (tail, normed_expected[:, :, -2:])]
    if not all(torch.allclose(one, two, rtol=1e-4, atol=1e-4) for one, two in pairs):
        raise ArithmeticError("they give other numbers than PyTorch")


def _is_dense(x: Tensor) -> bool:
    """Return whether the places of each clip are rows of channels without gaps."""
    return x.ndim == 5 and x[:1].is_contiguous(memory_format=torch.channels_last_3d)


def _launch_sums(x: Tensor, other: Tensor | None, offset: Tensor | None = None) -> Tensor:
    batch, channels = x.shape[:2]
    places, at_once = x[0, 0].numel(), triton.next_power_of_2(channels)
    shape = (2, batch, triton.cdiv(places, PLACES_EACH), channels)
    partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    grid = partial.shape[2], batch
    with torch.cuda.device_of(x):
        _sums_kernel[grid](
            x,
            x if other is None else other,
            x if offset is None else offset,
            partial,
            places,
            channels,
            x.stride(0),
            0 if other is None else other.stride(0),
            ADD=other is not None,
            OFFSET=offset is not None,
            CHANNELS=at_once,
            ROWS=max(IN_HAND // at_once, 1),
            ROWS_EACH=PLACES_EACH,
        )
    return partial.double().sum(2)
