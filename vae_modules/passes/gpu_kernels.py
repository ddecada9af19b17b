"""The VAE's passes over large tensors on a GPU, each reading and writing them once.

The kernels are those of `triton_kernels`. Tensors are (batch, channel, time, height, width) in channels-last memory,
where every place is a row of channels. If Triton is missing or fails, `serve` returns False, and the callers compute
the same in several passes.
"""

import functools
import logging

import torch
from torch import Tensor

from vae_modules.passes.latent_maps import LatentMaps

try:
    import triton

    from vae_modules.passes import triton_kernels
except ImportError:  # on a CPU, or Windows
    triton = None

logger = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
IN_HAND = 4096  # values that a program keeps in registers at once
PLACES_EACH = 2048  # places that a program sums in float32; their sums are added in float64
WIDEST = 2048  # channels
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
    places = max(IN_HAND // at_once, LEAST_OF_A_PRODUCT)
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
            PRECISION=_precision(x),
            LATENT_CHANNELS=max(triton.next_power_of_2(latent.shape[1]), LEAST_OF_A_PRODUCT) if maps else 1,
            CHANNELS=at_once,
            PLACES=places,
            num_warps=4 if maps is None else WARPS,
        )


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
    first_scale, first_shift = (drawn(2, 48, 2, 1, 1) for _ in range(2))
    maps = LatentMaps(drawn(2, 5, 2, 3, 5), *(drawn(48, *more) for more in ((5,), (), (5,), ())))
    outer_scale, outer_shift = (_twice(m).repeat_interleave(2, 3) for m in maps.scale_and_shift())
    factor, summand = (_twice(m).repeat_interleave(2, 3) for m in (scale, shift))
    expected, out = torch.nn.functional.silu(x * factor + summand), torch.empty_like(x)
    write_modulated_silu(out, x, scale, shift, True)
    normed = (_twice(x[:, :, :2]) * _twice(first_scale) + _twice(first_shift)) * outer_scale + outer_shift
    normed_expected, normed_out = torch.nn.functional.silu(normed), torch.empty_like(x)
    tail = torch.empty_like(x[:, :, :2], memory_format=torch.channels_last_3d)
    write_modulated_silu(normed_out, x[:, :, :2], first_scale, first_shift, True, maps, tail)
    offset = drawn(48)
    added = x + other + offset[:, None, None, None]
    halved, doubled = (
        torch.empty(shape, device=device).to(memory_format=torch.channels_last_3d)
        for shape in ((2, 48, 2, 7, 6), (2, 48, 3, 12, 10))
    )
    write_halved_sum(halved, x, other, offset, True, True)
    write_doubled_sum(doubled, x, other, offset)
    pairs = torch.cat([added[:, :, :1], added[:, :, 1:2].lerp(added[:, :, 2:], 0.5)], dim=2)
    total, shifted = x + other, x + _twice(other[:, :, :2]) + offset[:, None, None, None]
    sums, shifted_sums = (
        torch.stack([each.double().sum((2, 3, 4)), each.double().square().sum((2, 3, 4))]) for each in (total, shifted)
    )
    with_offset = x.clone()
    found, shifted_found = add_and_sum(x, other), add_and_sum(with_offset, other[:, :, :2], offset, True)
    same = [(out, expected), (normed_out, normed_expected), (x, total), (found, sums), (channel_sums(x), sums)]
    same += [(with_offset, shifted), (shifted_found, shifted_sums), (tail, normed_expected[:, :, -2:])]
    same += [(halved, torch.nn.functional.pad(pairs, (0, 1, 0, 1)))]
    same += [(doubled, added.repeat_interleave(2, 3).repeat_interleave(2, 4))]
    for window in ((1, 1, 1), (3, 3, 3)):
        weight = drawn(40, 48, *window) / 10
        product = torch.nn.functional.conv3d(x, weight)
        sums = torch.stack([product.double().sum((2, 3, 4)), product.double().square().sum((2, 3, 4))])
        same += [(product_sums(x, weight), sums)]
        out = torch.empty_like(product, memory_format=torch.channels_last_3d)
        factor, summand = drawn(2, 40, 1, 1, 1), drawn(2, 40, 1, 1, 1)
        write_product_silu(out, x, weight, factor, summand)
        same += [(out.clone(), torch.nn.functional.silu(product * factor + summand))]
        expected = out + product + offset[:40, None, None, None]
        found = add_product_and_sum(out, x, weight, offset[:40])
        same += [(out, expected), (found[0], expected.double().sum((2, 3, 4)))]
    if not all(torch.allclose(one, two, rtol=1e-4, atol=1e-4) for one, two in same):
        raise ArithmeticError("they give other numbers than PyTorch")


def _twice(x: Tensor) -> Tensor:
    """Return the two frames of `x`, the last of them twice."""
    return torch.cat([x, x[:, :, 1:]], dim=2)


def _is_dense(x: Tensor) -> bool:
    """Return whether the places of each clip are rows of channels without gaps."""
    return x.ndim == 5 and x[:1].is_contiguous(memory_format=torch.channels_last_3d)


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
    places, at_once = (
        frames * height * width,
        max(min(triton.next_power_of_2(channels), PRODUCT_CHANNELS), LEAST_OF_A_PRODUCT),
    )
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
