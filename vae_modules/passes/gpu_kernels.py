"""The VAE's passes over large tensors on a GPU, each reading and writing them once.

The kernels are those of `triton_kernels`. Tensors are (batch, channel, time, height, width) in channels-last memory,
where every place is a row of channels. `gpu_support` decides whether they serve.
"""

import torch
import triton
from torch import Tensor

from vae_modules.passes import triton_kernels
from vae_modules.passes.latent_maps import LatentMaps

IN_HAND = 4096  # values that a program keeps in registers at once
PLACES_EACH = 2048  # places that a program sums in float32; their sums are added in float64
LEAST_OF_A_PRODUCT = 16  # rows, inner size and channels of Triton's products
PRODUCT_ROWS, PRODUCT_INNER, PRODUCT_CHANNELS = 32, 32, 128  # sizes of a product that a program makes at once
WARPS = 8  # of a program with products: with four, registers spill on compute capability 8.0 and 9.0 (ptxas -v)


def channel_sums(x: Tensor) -> Tensor:
    """Return the sums of `x` and of its square over space and time.

    Returns:
        float64 (2, batch, channel).
    """
    return _launch_sums(x, None)


def add_and_sum(x: Tensor, other: Tensor, offset: Tensor | None = None, lead: bool = False) -> Tensor:
    """Return the sums of `channel_sums.add_in_place`, and add in place."""
    return _launch_sums(x, other, offset, lead)


def write_modulated_silu(
    out: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    lead: bool,
    maps: LatentMaps | None = None,
    tail: Tensor | None = None,
) -> None:
    """Write silu(x * scale + shift) into `out`; see `modulation.write_modulated_silu`."""
    batch, channels, frames, height, width = out.shape
    if shift.stride() != scale.stride():
        scale, shift = scale.contiguous(), shift.contiguous()
    alone = int(lead and frames > 1)
    latent, weight, bias = scale, scale, scale
    if maps is not None:
        latent, bias = maps.latent, torch.stack([maps.scale_bias, maps.shift_bias])
        weight = torch.stack([maps.scale_weight.t(), maps.shift_weight.t()]).contiguous()
    at_once = triton.next_power_of_2(channels)
    places = max(IN_HAND // at_once, 1 if maps is None else LEAST_OF_A_PRODUCT)
    with torch.cuda.device_of(x):
        triton_kernels.modulated_silu_kernel[batch * frames * height, triton.cdiv(width, places)](
            out,
            out if tail is None else tail,
            x,
            scale,
            shift,
            latent,
            weight,
            bias,
            channels,
            latent.shape[1],
            frames,
            height,
            width,
            out.stride(0),
            0 if tail is None else tail.stride(0),
            0 if tail is None else tail.shape[2],
            x.stride(0),
            _per_frame(frames, x.shape[2], alone),
            alone,
            *_places_of(scale, out, alone),
            *_places_of(latent, out, alone),
            LATENT=maps is not None,
            TAIL=tail is not None,
            PRECISION=_precision(latent),
            LATENT_CHANNELS=max(triton.next_power_of_2(latent.shape[1]), LEAST_OF_A_PRODUCT) if maps else 1,
            CHANNELS=at_once,
            PLACES=places,
            num_warps=4 if maps is None else WARPS,
        )


def write_halved_sum(
    out: Tensor, x: Tensor, other: Tensor | None, offset: Tensor | None, halve_time: bool, lead: bool
) -> None:
    """Write the result of `resized_sums.halved_sum` into `out`."""
    _launch_resized_sum(out, x, other, offset, int(lead) if halve_time else x.shape[2], double=False)


def write_doubled_sum(out: Tensor, x: Tensor, other: Tensor | None, offset: Tensor | None) -> None:
    """Write the result of `resized_sums.doubled_sum` into `out`."""
    _launch_resized_sum(out, x, other, offset, x.shape[2], double=True)


def product_sums(source: Tensor, weight: Tensor) -> Tensor:
    """Return the result of `products.Product.sums`."""
    return _launch_product(None, source, weight)


def add_product_and_sum(x: Tensor, source: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
    """Return the sums of `products.Product.add_to`, and add to `x`."""
    return _launch_product(x, source, weight, offset=offset)


def write_product_silu(out: Tensor, source: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Do the same as `products.Product.write_modulated_silu`."""
    _launch_product(out, source, weight, modulation=(scale, shift))


def _places_of(maps: Tensor, out: Tensor, alone: int) -> tuple[int, ...]:
    """Return a smaller tensor's strides, and the frames, rows and columns that a place is for.

    The stride of a size of 1 is 0.
    """
    strides = (0 if size == 1 else stride for size, stride in zip(maps.shape, maps.stride(), strict=True))
    frames, height, width = out.shape[2:]
    return *strides, _per_frame(frames, maps.shape[2], alone), height // maps.shape[3], width // maps.shape[4]


def _precision(x: Tensor) -> str:
    """Return the precision of products of float32; others are exact."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _per_frame(frames: int, stored: int, alone: int) -> int:
    """Return how many of `frames` each stored frame stands for, except the first `alone`."""
    return max((frames - alone) // max(stored - alone, 1), 1)


def _launch_sums(x: Tensor, other: Tensor | None, offset: Tensor | None = None, lead: bool = False) -> Tensor:
    batch, channels, frames = x.shape[:3]
    alone = int(lead and frames > 1)
    places, at_once = x[0, 0].numel(), triton.next_power_of_2(channels)
    shape = (2, batch, triton.cdiv(places, PLACES_EACH), channels)
    partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    grid = partial.shape[2], batch
    with torch.cuda.device_of(x):
        triton_kernels.sums_kernel[grid](
            x,
            x if other is None else other,
            x if offset is None else offset,
            partial,
            places,
            channels,
            x.stride(0),
            0 if other is None else other.stride(0),
            places // frames,
            alone,
            1 if other is None else _per_frame(frames, other.shape[2], alone),
            ADD=other is not None,
            OFFSET=offset is not None,
            CHANNELS=at_once,
            ROWS=max(IN_HAND // at_once, 1),
            ROWS_EACH=PLACES_EACH,
        )
    return partial.double().sum(2)


def _launch_resized_sum(
    out: Tensor, x: Tensor, other: Tensor | None, offset: Tensor | None, alone: int, double: bool
) -> None:
    batch, channels, _, height, width = x.shape
    frames, at_once = out.shape[2], triton.next_power_of_2(channels)
    places = max(IN_HAND // at_once, 1)
    rows, columns = (height, width) if double else (height + 1, width + 1)
    with torch.cuda.device_of(x):
        triton_kernels.resized_sum_kernel[batch * frames * rows, triton.cdiv(columns, places)](
            out,
            x,
            x if other is None else other,
            x if offset is None else offset,
            channels,
            frames,
            height,
            width,
            x.stride(0),
            0 if other is None else other.stride(0),
            alone,
            OTHER=other is not None,
            OFFSET=offset is not None,
            DOUBLE=double,
            CHANNELS=at_once,
            PLACES=places,
        )


def _launch_product(
    out: Tensor | None,
    source: Tensor,
    weight: Tensor,
    offset: Tensor | None = None,
    modulation: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    batch, in_channels = source.shape[:2]
    channels, window = len(weight), weight.shape[2:]
    frames, height, width = (size - extent + 1 for size, extent in zip(source.shape[2:], window, strict=True))
    factors = weight.permute(2, 3, 4, 1, 0).reshape(-1, channels).contiguous()
    places = frames * height * width
    at_once = max(min(triton.next_power_of_2(channels), PRODUCT_CHANNELS), LEAST_OF_A_PRODUCT)
    blocks, has_sums = triton.cdiv(places, PLACES_EACH), modulation is None
    shape = (2, batch, blocks, channels) if has_sums else (1,)
    partial = torch.empty(shape, dtype=torch.float32, device=source.device)
    scale, shift = (each.flatten(1).contiguous() for each in modulation or (partial, partial))
    to = partial if out is None else out
    with torch.cuda.device_of(source):
        triton_kernels.product_kernel[blocks, batch, triton.cdiv(channels, at_once)](
            to,
            source,
            factors,
            factors if offset is None else offset,
            scale,
            shift,
            partial,
            places,
            channels,
            len(factors),
            height,
            width,
            to.stride(0),
            source.stride(0),
            *source.stride()[2:],
            ADD=out is not None and modulation is None,
            OFFSET=offset is not None,
            SILU=modulation is not None,
            SUMS=has_sums,
            IN_CHANNELS=in_channels,
            WINDOW_HEIGHT=window[1],
            WINDOW_WIDTH=window[2],
            PRECISION=_precision(source),
            CHANNELS=at_once,
            INNER=PRODUCT_INNER,
            ROWS=PRODUCT_ROWS,
            ROWS_EACH=PLACES_EACH,
            num_warps=WARPS,
        )
    return partial.double().sum(2) if has_sums else partial
