"""Triton kernels of the VAE's passes over large tensors; `gpu_kernels` launches them.

A tensor is rows of channels, one row after the other for each place, in the order batch, frame, height, width.
"""

import triton
import triton.language as tl


@triton.jit
def _stored(frame, alone, per_frame):  # type: ignore[no-untyped-def]
    """Return which stored frame stands for a frame: `alone` for one each, then `per_frame`."""
    return tl.where(frame < alone, frame, alone + (frame - alone) // per_frame)


@triton.jit
def sums_kernel(  # type: ignore[no-untyped-def]
    x,
    other,
    offset,
    partial,
    rows,
    channels,
    x_batch,
    other_batch,
    frame_rows,
    alone,
    per_frame,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_EACH: tl.constexpr,
):
    """Sum rows and their squares.

    With ADD the rows of `other`, whose frames may be repeated, are added to those of `x` first; with OFFSET also a
    number for each channel.
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
        place = x + batch.to(tl.int64) * x_batch + row[:, None] * channels + channel[None, :]
        value = tl.load(place, mask=mask, other=0.0)
        if ADD:
            row = _stored(row // frame_rows, alone, per_frame) * frame_rows + row % frame_rows
            offsets = row[:, None] * channels + channel[None, :]
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
def modulated_silu_kernel(  # type: ignore[no-untyped-def]
    out,
    tail,
    x,
    scale,
    shift,
    latent,
    weight,
    bias,
    channels,
    latent_channels,
    frames,
    height,
    width,
    out_batch,
    tail_batch,
    tail_frames,
    x_batch,
    x_per_frame,
    alone,
    map_batch,
    map_channel,
    map_frame,
    map_row,
    map_column,
    map_per_frame,
    map_per_row,
    map_per_column,
    latent_batch,
    latent_channel,
    latent_frame,
    latent_row,
    latent_column,
    latent_per_frame,
    latent_per_row,
    latent_per_column,
    LATENT: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    LATENT_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Write silu(x * scale + shift) for some places of a row of an image.

    With LATENT, another scale and shift apply before SiLU: `weight` (2, latent_channels, channels) times the latent,
    plus `bias` (2, channels). With TAIL the last frames are also written to `tail`. The frames of `x`, the maps and the
    latent may be repeated.
    """
    line = tl.program_id(0).to(tl.int64)  # counts all rows of all frames of all clips
    row, frame, batch = line % height, line // height % frames, line // height // frames
    column = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    channel = tl.arange(0, CHANNELS)
    inside = channel < channels
    mask = (column < width)[:, None] & inside[None, :]
    at = batch * map_batch + _stored(frame, alone, map_per_frame) * map_frame + row // map_per_row * map_row
    maps = at + (column // map_per_column)[:, None] * map_column + channel[None, :] * map_channel
    factor = tl.load(scale + maps, mask=mask, other=0.0).to(tl.float32)
    summand = tl.load(shift + maps, mask=mask, other=0.0).to(tl.float32)
    if LATENT:
        k = tl.arange(0, LATENT_CHANNELS)
        at = batch * latent_batch + _stored(frame, alone, latent_per_frame) * latent_frame
        at += row // latent_per_row * latent_row
        places = at + (column // latent_per_column)[:, None] * latent_column + k[None, :] * latent_channel
        z = tl.load(latent + places, mask=(column < width)[:, None] & (k < latent_channels)[None, :], other=0.0)
        cells = k[:, None] * channels + channel[None, :]
        used = (k < latent_channels)[:, None] & inside[None, :]
        second = latent_channels * channels
        outer = tl.dot(z, tl.load(weight + cells, mask=used, other=0.0), input_precision=PRECISION)
        outer += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
        factor, summand = factor * outer, summand * outer
        summand += tl.dot(z, tl.load(weight + second + cells, mask=used, other=0.0), input_precision=PRECISION)
        summand += tl.load(bias + channels + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    source = _stored(frame, alone, x_per_frame)
    offsets = ((source * height + row) * width + column)[:, None] * channels + channel[None, :]
    value = tl.load(x + batch * x_batch + offsets, mask=mask, other=0.0).to(tl.float32)
    value = value * factor + summand
    value = value / (1.0 + tl.exp(-value))
    result = value.to(out.dtype.element_ty)
    offsets = ((frame * height + row) * width + column)[:, None] * channels + channel[None, :]
    tl.store(out + batch * out_batch + offsets, result, mask=mask)
    if TAIL:
        in_tail = frame - frames + tail_frames
        offsets = ((in_tail * height + row) * width + column)[:, None] * channels + channel[None, :]
        tl.store(tail + batch * tail_batch + offsets, result, mask=mask & (in_tail >= 0))


@triton.jit
def resized_sum_kernel(  # type: ignore[no-untyped-def]
    out,
    x,
    other,
    offset,
    channels,
    frames,
    height,
    width,
    x_batch,
    other_batch,
    alone,
    OTHER: tl.constexpr,
    OFFSET: tl.constexpr,
    DOUBLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Write x + other + offset for some places of a row of the result's `frames`.

    With DOUBLE each value is written to 2x2 pixels; without, frames after the first `alone` are the averages of pairs,
    and a row and a column of zeros follow the image. `height` and `width` are those of `x`.
    """
    lines = height if DOUBLE else height + 1
    line = tl.program_id(0).to(tl.int64)
    row, frame, batch = line % lines, line // lines % frames, line // lines // frames
    column = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    channel = tl.arange(0, CHANNELS)
    mask = ((column < width) & (row < height))[:, None] & (channel < channels)[None, :]
    first = tl.where(frame < alone, frame, 2 * frame - alone)
    offsets = ((first * height + row) * width + column)[:, None] * channels + channel[None, :]
    value = tl.load(x + batch * x_batch + offsets, mask=mask, other=0.0).to(tl.float32)
    if OTHER:
        value += tl.load(other + batch * other_batch + offsets, mask=mask, other=0.0).to(tl.float32)
    if DOUBLE:
        if OFFSET:
            value += tl.load(offset + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
        result = value.to(out.dtype.element_ty)
        top = ((batch * frames + frame) * 2 * height + 2 * row) * 2 * width
        corner = (top + 2 * column)[:, None] * channels + channel[None, :]
        for down in tl.static_range(2):
            for right in tl.static_range(2):
                tl.store(out + corner + (down * 2 * width + right) * channels, result, mask=mask)
    else:
        if frame >= alone:
            offsets += tl.cast(height, tl.int64) * width * channels
            value += tl.load(x + batch * x_batch + offsets, mask=mask, other=0.0).to(tl.float32)
            if OTHER:
                value += tl.load(other + batch * other_batch + offsets, mask=mask, other=0.0).to(tl.float32)
            value *= 0.5
        if OFFSET:
            value += tl.load(offset + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
        value = tl.where(mask, value, 0.0)
        place = ((batch * frames + frame) * (height + 1) + row) * (width + 1) + column
        at = place[:, None] * channels + channel[None, :]
        written = (column < width + 1)[:, None] & (channel < channels)[None, :]
        tl.store(out + at, value.to(out.dtype.element_ty), mask=written)


@triton.jit
def product_kernel(  # type: ignore[no-untyped-def]
    out,
    source,
    weight,
    offset,
    scale,
    shift,
    partial,
    rows,
    channels,
    inner,
    height,
    width,
    out_batch,
    source_batch,
    source_frame,
    source_row,
    source_column,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
    SILU: tl.constexpr,
    SUMS: tl.constexpr,
    IN_CHANNELS: tl.constexpr,
    WINDOW_HEIGHT: tl.constexpr,
    WINDOW_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_EACH: tl.constexpr,
):
    """Convolve `source` without padding.

    The result's rows are places of images of `height` and `width`. Row `k` of `weight` (inner, channels) is for one
    input channel of one tap. With ADD the result and, with OFFSET, a number for each channel are added to `out`; with
    SILU silu(result * scale + shift) is written to `out`; with SUMS the sums of the rows and of their squares are
    written to `partial`.
    """
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    total = tl.zeros((CHANNELS,), dtype=tl.float32)
    square = tl.zeros((CHANNELS,), dtype=tl.float32)
    for start in range(0, ROWS_EACH, ROWS):
        row = block.to(tl.int64) * ROWS_EACH + start + tl.arange(0, ROWS)
        column, line = row % width, row // width
        corner = line // height * source_frame + line % height * source_row + column * source_column
        value = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
        for first in range(0, inner, INNER):
            k = first + tl.arange(0, INNER)
            tap = k // IN_CHANNELS
            in_window = tap % WINDOW_WIDTH * source_column + tap // WINDOW_WIDTH % WINDOW_HEIGHT * source_row
            in_window += tap // (WINDOW_WIDTH * WINDOW_HEIGHT) * source_frame + k % IN_CHANNELS
            seen = tl.load(
                source + batch * source_batch + corner[:, None] + in_window[None, :],
                mask=(row < rows)[:, None] & (k < inner)[None, :],
                other=0.0,
            )
            factors = tl.load(
                weight + k[:, None] * channels + channel[None, :],
                mask=(k < inner)[:, None] & inside[None, :],
                other=0.0,
            )
            value = tl.dot(seen, factors, value, input_precision=PRECISION)
        mask = (row < rows)[:, None] & inside[None, :]
        place = out + batch * out_batch + row[:, None] * channels + channel[None, :]
        if ADD:
            value += tl.load(place, mask=mask, other=0.0).to(tl.float32)
            if OFFSET:
                value += tl.load(offset + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
            result = tl.where(mask, value, 0.0).to(out.dtype.element_ty)
            tl.store(place, result, mask=mask)
            value = result.to(tl.float32)
        if SILU:
            value *= tl.load(scale + batch * channels + channel, mask=inside, other=0.0)[None, :]
            value += tl.load(shift + batch * channels + channel, mask=inside, other=0.0)[None, :]
            tl.store(place, (value / (1.0 + tl.exp(-value))).to(out.dtype.element_ty), mask=mask)
        if SUMS:
            total += tl.sum(value, axis=0)
            square += tl.sum(value * value, axis=0)
    if SUMS:
        to = partial + (batch * tl.num_programs(0) + block) * channels + channel
        tl.store(to, total, mask=inside)
        half = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * channels
        tl.store(to + half, square, mask=inside)
