"""Normalization's passes are equal on the whole and on pieces, and read tensors once."""

import pytest
import torch
import torch.nn.functional as F

from memory_traffic import traffic_of
from seeded import seeded_input
from sgm.modules.autoencoding.meta_device import standing_for
from sgm.util import instantiate_from_config
from support import Reference, assert_close
from vae_modules.passes import modulation, pieces_in_cache
from vae_modules.passes.channel_sums import add_in_place, channel_sums
from vae_modules.passes.latent_maps import LatentMaps
from vae_modules.passes.products import Product, stay_unwritten
from vae_modules.passes.resized_sums import doubled_sum, halved_sum

pytestmark = pytest.mark.usefixtures("one_thread")

FULL = (49, 480, 720)


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return seeded_input("passes", shape).to(dtype).contiguous(memory_format=torch.channels_last_3d)


def sums_of(x: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return torch.stack([wide.sum((2, 3, 4)), wide.square().sum((2, 3, 4))])


def repeated(x: torch.Tensor) -> torch.Tensor:
    """Return the three frames of `x`, all but the first twice."""
    return x.repeat_interleave(torch.tensor([1, 2, 2]), 2)


MAPS = [(2, 5, 3, 4, 3), (8, 5), (8,), (8, 5), (8,)]  # of a latent of five channels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cached", [2**9, 2**18])
def test_pieces_in_the_cache_change_nothing(monkeypatch, dtype, cached):
    monkeypatch.setattr(pieces_in_cache, "CACHED", cached)
    x, other = channels_last(2, 8, 5, 12, 6, dtype=dtype), channels_last(2, 8, 5, 12, 6, dtype=dtype).flip(2)
    wide, offset = x.double(), seeded_input("offset", (8,)).to(dtype)
    assert_close(channel_sums(x), sums_of(x), 1e-5)
    maps = [seeded_input(name, (2, 8, 3, 4, 3)).to(torch.promote_types(dtype, torch.float32)) for name in "ab"]
    full = [repeated(m).repeat_interleave(3, 3).repeat_interleave(2, 4) for m in maps]
    expected = F.silu(wide * full[0] + full[1])
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert_close(modulation.modulated_silu(x, *maps, lead=True), expected, tolerance)
    latent_maps = LatentMaps(*(seeded_input(f"m{shape}", shape).to(dtype) for shape in MAPS))
    outer = [repeated(m).repeat_interleave(3, 3).repeat_interleave(2, 4) for m in latent_maps.scale_and_shift()]
    for steps, short in (
        (1, False),
        (3, False),
        (3, True),
    ):  # norms of the whole and of parts; frames that are repeated
        norm = [seeded_input(name, (2, 8, steps, 1, 1)).to(maps[0].dtype) for name in "cd"]
        room, tail = torch.zeros(2, 8, 7, 12, 6, dtype=dtype), torch.zeros(2, 8, 2, 12, 6, dtype=dtype)
        source = x[:, :, :3] if short else x
        modulation.write_modulated_silu(room[:, :, 2:], source, *norm, True, latent_maps, tail)
        assert torch.equal(tail, room[:, :, -2:])
        scale, shift = (repeated(each) if steps > 1 else each for each in norm)
        values = repeated(source.double()) if short else wide
        assert_close(room[:, :, 2:], F.silu((values * scale + shift) * outer[0] + outer[1]), tolerance)
    modulation.write_modulated_silu(x, x, *maps, True)
    assert_close(x, expected, tolerance)
    for summand, more in ((other, other), (other[:, :, :3], repeated(other[:, :, :3]))):
        for added in (None, offset):
            to = x.clone(memory_format=torch.preserve_format)
            sums = add_in_place(to, summand, added, lead=True)
            assert_close(to, x.double() + more + (0 if added is None else added[:, None, None, None]), tolerance)
            assert_close(sums, sums_of(to), 1e-5)
    total = x.double() + other + offset[:, None, None, None]
    pairs = torch.cat([total[:, :, :1], (total[:, :, 1::2] + total[:, :, 2::2]) / 2], dim=2)
    assert_close(halved_sum(x, other, offset, True, True), F.pad(pairs, (0, 1, 0, 1)), tolerance)
    assert_close(halved_sum(x, None, None, False, True), F.pad(x, (0, 1, 0, 1)), 0)
    assert_close(doubled_sum(x, other, offset), total.repeat_interleave(2, 3).repeat_interleave(2, 4), tolerance)
    assert_close(doubled_sum(x, None, None), x.repeat_interleave(2, 3).repeat_interleave(2, 4), 0)


@pytest.mark.parametrize(
    ("task", "at_once", "most"), [("encode", None, 130e9), ("decode", None, 300e9), ("decode", 48, 250e9)]
)
@pytest.mark.slow
def test_bytes_beside_convolutions_at_full_size(task, at_once, most):
    """49 frames of 480x720 in bfloat16; decoding chunk by chunk, or all chunks at once."""
    config = Reference("vae/vae_small").case["first_stage_config"]
    for part in ("encoder_config", "decoder_config"):
        config["params"][part]["params"] |= {"ch": 128, "num_res_blocks": 3}
    frames, height, width = FULL
    with torch.device("meta"):
        vae = instantiate_from_config(config).to(torch.bfloat16).eval()
        clip = torch.empty(1, 3, frames, height, width, dtype=torch.bfloat16)
        latent = torch.empty(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, dtype=torch.bfloat16)
    run = {"encode": lambda: vae.encode(clip, unregularized=True), "decode": lambda: list(vae.decode_chunks(latent))}
    vae.use_frames_at_once(at_once)
    assert 0.9 * most < traffic_of(run[task]).total <= most


def test_products_stay_unwritten_on_a_gpu_only():
    x, weight = torch.empty(1, 4, 1, 2, 2, device="meta"), torch.empty(8, 4, 1, 1, 1, device="meta")
    assert stay_unwritten(x, weight) and not stay_unwritten(x.bfloat16(), weight)  # as under autocast
    with standing_for("cpu"):
        assert not stay_unwritten(x, weight)
    assert not stay_unwritten(torch.empty(x.shape), torch.empty(weight.shape))


@pytest.mark.parametrize("window", [(1, 1, 1), (3, 3, 3)], ids=str)
def test_products_equal_their_tensors(window):
    source, weight = channels_last(2, 4, 5, 6, 7), seeded_input("weight", (8, 4, *window))
    product = Product(source, weight)
    tensor = product.written()
    assert product.shape == tensor.shape and product.dtype == tensor.dtype
    assert_close(product.sums(), sums_of(tensor), 1e-6)
    scale, shift, offset = (seeded_input(name, (2, 8, 1, 1, 1)) for name in "abc")
    out, offset = torch.empty_like(tensor), offset[0].flatten()
    product.write_modulated_silu(out, scale, shift)
    assert_close(out, F.silu(tensor * scale + shift), 1e-6)
    expected = out + tensor + offset[:, None, None, None]
    assert_close(product.add_to(out, offset), sums_of(expected), 1e-6)
    assert_close(out, expected, 1e-6)
    if window[0] == 1:
        assert torch.equal(torch.cat([part.written() for part in product.split([1, 4])], dim=2), tensor)
    else:
        assert product.split([3]) == [product]
