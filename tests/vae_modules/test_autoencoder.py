"""The video autoencoder equals the reference numbers and diffusers."""

import gc
import json

import pytest
import torch
from safetensors.torch import save_file

from diffusers_vae import as_diffusers, diffusers_name
from long_cases import others_long
from seeded import seed_module_, seeded_input
from sgm.errors import UserError
from sgm.models.video_coder import decoding_schedule
from sgm.modules.autoencoding import tiling
from sgm.modules.autoencoding.clip import Chunk
from sgm.util import instantiate_from_config
from support import REFERENCE, Reference, assert_close, relative_error
from vae_modules import convolutions, residual_block
from vae_modules.autoencoder import VideoAutoencoderInferenceWrapper
from vae_modules.cp_enc_dec import ContextParallelDecoder3D, ContextParallelEncoder3D

CASES = ["vae_small", "vae_two_blocks"]


def build(case: dict, **params) -> VideoAutoencoderInferenceWrapper:
    config = case["first_stage_config"]
    return instantiate_from_config({**config, "params": {**config["params"], **params}}).eval()


@pytest.fixture(scope="module", params=CASES)
def recorded(request):
    """Return (reference, its autoencoder, the name of its inputs)."""
    reference = Reference(f"vae/{request.param}")
    return reference, seed_module_(build(reference.case), reference.case["seed"]), request.param


@pytest.fixture(scope="module")
def vae():
    return seed_module_(build(Reference("vae/vae_small").case))


pytestmark = pytest.mark.usefixtures("one_thread")


def latent(frames: int, height: int = 2, width: int = 3) -> torch.Tensor:
    return seeded_input("latent", (1, 16, frames, height, width))


def video(frames: int, height: int = 16, width: int = 24) -> torch.Tensor:
    return seeded_input("video", (1, 3, frames, height, width)).clamp(-1, 1)


# ---------------------------------------------------------------- reference numbers


def test_parameter_names_and_shapes(recorded):
    reference, vae, _ = recorded
    assert {name: list(value.shape) for name, value in vae.state_dict().items()} == reference.case["keys"]


def test_full_size_is_that_of_the_released_weights():
    manifest = json.loads((REFERENCE / "manifests/vae.json").read_text())
    case = Reference("vae/vae_small").case
    params = case["first_stage_config"]["params"]
    for part in ("encoder_config", "decoder_config"):
        params[part]["params"] |= {"ch": 128, "num_res_blocks": 3}
    with torch.device("meta"):
        vae = build(case)
    assert {name: list(value.shape) for name, value in vae.state_dict().items()} == manifest["keys"]
    assert sum(value.numel() for value in vae.parameters()) == manifest["parameters"]


@pytest.mark.parametrize("gradient", [False, True])
def test_encoder_reference(recorded, gradient):
    """Some layers overwrite their temporaries without gradients."""
    reference, vae, name = recorded
    for frames in reference.case["frames"]:
        x = seeded_input(f"{name}.video{frames}", (1, 3, frames, *reference.case["video_hw"]), reference.case["seed"])
        with torch.set_grad_enabled(gradient):
            moments = vae.encode(x.clamp(-1, 1), unregularized=True)[0]
        assert_close(moments, reference[f"moments.{frames}"], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True])
def test_decoder_reference(recorded, gradient):
    reference, vae, name = recorded
    for frames in reference.case["latents"]:
        expected = reference[f"frames.{frames}"]
        height, width = (side // 8 for side in reference.case["video_hw"])
        channels = vae.decoder.conv_in.conv.in_channels
        z = seeded_input(f"{name}.latent{frames}", (1, channels, frames, height, width), reference.case["seed"])
        schedule = reference.case["decode_chunks"][str(frames)]
        assert decoding_schedule(frames) == schedule
        with torch.set_grad_enabled(gradient):
            streamed = torch.cat(list(vae.decode_chunks(z)), dim=2)
            chunks = z.split(schedule, dim=2)
            called = [vae.decode(c, clear_fake_cp_cache=c is chunks[-1]) for c in chunks]
        assert_close(streamed, expected, 1e-5)
        assert torch.equal(torch.cat(called, dim=2), streamed)


@pytest.mark.parametrize("name", ["t2v_2b", "i2v_5b"])
def test_sampled_latent_reference(name):
    """The posterior's noise comes from the CPU generator, in the recorded order."""
    reference = Reference(f"engine/{name}")
    config = reference.case["model"]["first_stage_config"]
    vae = seed_module_(instantiate_from_config(config), reference.case["seed"], prefix="first_stage_model.")
    x = seeded_input(f"{name}.video", reference.case["video"], reference.case["seed"]).clamp(-1, 1)
    torch.manual_seed(reference.case["torch_manual_seed"]["encode"])
    with torch.no_grad():
        z = vae.encode(x.transpose(1, 2))
    assert_close(z * reference.case["model"]["scale_factor"], reference["latent"], 1e-5)


# ---------------------------------------------------------------- diffusers


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 9, 21])
def test_encode_agrees_with_diffusers(vae, frames):
    x = video(frames).repeat(2, 1, 1, 1, 1) * torch.tensor([1.0, -0.5]).view(2, 1, 1, 1, 1)
    expected = as_diffusers(vae, 32, 1, 16).encode(x).latent_dist.parameters
    assert_close(vae.encode(x, unregularized=True)[0], expected, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7])
def test_decode_agrees_with_diffusers(vae, frames):
    """Even counts too, where no frame stands alone."""
    z = latent(frames).repeat(2, 1, 1, 1, 1) * torch.tensor([1.0, -0.5]).view(2, 1, 1, 1, 1)
    decoded = torch.cat(list(vae.decode_chunks(z)), dim=2)
    assert_close(decoded, as_diffusers(vae, 32, 1, 16).decode(z).sample, 1e-5)


@pytest.mark.slow
def test_gradients_agree_with_diffusers(vae):
    other = as_diffusers(vae, 32, 1, 16)
    cotangent = seeded_input("cotangent", (1, 32, 3, 2, 3))
    (vae.encode(video(9), unregularized=True)[0] * cotangent).sum().backward()
    (other.encode(video(9)).latent_dist.parameters * cotangent).sum().backward()
    cotangent = seeded_input("cotangent", (1, 3, 17, 16, 24))
    z, other_z = latent(5).requires_grad_(), latent(5).requires_grad_()
    (torch.cat(list(vae.decode_chunks(z)), dim=2) * cotangent).sum().backward()
    (other.decode(other_z).sample * cotangent).sum().backward()
    assert_close(z.grad, other_z.grad, 1e-4)
    others = dict(other.named_parameters())
    for name, parameter in vae.named_parameters():
        expected = others[diffusers_name(name)].grad
        # A bias right before a norm of one channel a group has no effect: its gradient is rounding.
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm() + 1e-3, name
    vae.zero_grad(set_to_none=True)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(dtype):
    case = Reference("vae/vae_small").case
    vae, half = seed_module_(build(case)), seed_module_(build(case)).to(dtype)
    moments = half.encode(video(9).to(dtype), unregularized=True)[0]
    assert moments.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.01
    assert relative_error(moments, vae.encode(video(9), unregularized=True)[0]) < tolerance
    decoded = torch.cat(list(half.decode_chunks(latent(3).to(dtype))), dim=2)
    assert relative_error(decoded, torch.cat(list(vae.decode_chunks(latent(3))), dim=2)) < tolerance


# ---------------------------------------------------------------- state


def test_schedule():
    assert decoding_schedule(13) == [3, 2, 2, 2, 2, 2]
    assert decoding_schedule(22) == [2] * 11
    assert [sum(decoding_schedule(n)) for n in range(1, 30)] == list(range(1, 30))
    with pytest.raises(UserError, match="latent frames: expected at least 1, got 0"):
        decoding_schedule(0)


@pytest.mark.slow
@torch.no_grad()
def test_an_unfinished_clip_leaves_nothing_behind(vae):
    z = latent(5)
    expected = list(vae.decode_chunks(z))
    chunks = vae.decode_chunks(z)
    next(chunks)  # a consumer that stops early
    del chunks
    gc.collect()
    for a, b in zip(vae.decode_chunks(z), expected, strict=True):
        assert torch.equal(a, b)

    vae.decode(z[:, :, :3])
    with pytest.raises(UserError, match="unfinished clip"):
        vae.decode(z[:, :, 3:, :1])
    assert torch.equal(vae.decode(z[:, :, :3], clear_fake_cp_cache=True), expected[0])


@torch.no_grad()
def test_two_streams_at_once(vae):
    one, two = latent(5), latent(5).flip(2)
    pairs = zip(vae.decode_chunks(one), vae.decode_chunks(two), strict=True)
    interleaved = [torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True)]
    assert torch.equal(interleaved[0], torch.cat(list(vae.decode_chunks(one)), dim=2))
    assert torch.equal(interleaved[1], torch.cat(list(vae.decode_chunks(two)), dim=2))


@torch.no_grad()
def test_a_decoder_may_be_told_that_the_first_of_an_even_number_stands_alone(vae):
    """As when a clip of five frames, two latent ones, is decoded at once."""
    assert vae.decoder(latent(2), Chunk(lead=True)).shape[2] == 5
    assert vae.decoder(latent(2)).shape[2] == 8


def test_inputs_are_not_modified(vae):
    x, z = video(5), latent(3)
    with torch.no_grad():
        vae.encode(x)
        list(vae.decode_chunks(z))
    assert torch.equal(x, video(5)) and torch.equal(z, latent(3))


@pytest.mark.parametrize("shape", [(4, 32, 48), (5, 30, 48), (5, 32, 44), (0, 32, 48)])
def test_unfit_clips_are_refused(vae, shape):
    with pytest.raises(UserError, match=rf"{shape[0]} frames of {shape[1]}x{shape[2]}"):
        vae.encode(torch.zeros(1, 3, *shape))


# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize(("height", "width", "size"), [(8, 12, 4), (7, 13, 5), (3, 30, 8), (9, 9, 9), (5, 6, 1)])
def test_blended_tiles_of_a_pointwise_operation_are_the_whole(height, width, size):
    """Whatever the image's size, the tiles cover it and their weights add up to one."""
    x = seeded_input("tiles", (2, 3, 2 * height, 2 * width))
    grid = tiling.cover(height, width, size)
    blended = tiling.process(grid, x, lambda _, tile: tile.repeat_interleave(2, 2).repeat_interleave(2, 3), (2, 4))
    assert_close(blended, x.repeat_interleave(2, 2).repeat_interleave(2, 3), 1e-6)
    assert all(tile.height <= size and tile.width <= size for tile in grid)


@torch.no_grad()
@pytest.mark.slow
def test_tiles_in_encode_and_decode(vae):
    """The corner of the first tile alone equals that tile's result, with its own past."""
    x, z = video(5, 32, 80), latent(5, 4, 10)
    corner = vae.encode(x[..., :32], unregularized=True)[0], torch.cat(list(vae.decode_chunks(z[..., :4])), dim=2)
    vae.tile_size = 32
    try:
        moments, frames = vae.encode(x, unregularized=True)[0], torch.cat(list(vae.decode_chunks(z)), dim=2)
    finally:
        vae.tile_size = None
    assert moments.shape == (1, 32, 2, 4, 10) and frames.shape == (1, 3, 17, 32, 80)
    assert_close(moments[..., :2], corner[0][..., :2], 1e-5)
    assert_close(frames[..., :16], corner[1][..., :16], 1e-5)


@torch.no_grad()
def test_one_tile_is_the_whole_image(vae):
    whole = torch.cat(list(vae.decode_chunks(latent(3))), dim=2)
    tiled = build(Reference("vae/vae_small").case, tile_size=24)
    tiled.load_state_dict(vae.state_dict())
    assert torch.equal(torch.cat(list(tiled.decode_chunks(latent(3))), dim=2), whole)
    tiled.tile_size = 20
    with pytest.raises(UserError, match="20 is not a positive multiple of 8"):
        tiled.encode(video(1))


# ---------------------------------------------------------------- weights and options


def test_weights_from_files(vae, tmp_path):
    weights = vae.state_dict()
    torch.save({"state_dict": {**weights, "loss.logvar": torch.zeros(1)}}, tmp_path / "3d-vae.pt")
    save_file(weights, tmp_path / "vae.safetensors")
    for file in ("3d-vae.pt", "vae.safetensors"):
        loaded = build(Reference("vae/vae_small").case, ckpt_path=tmp_path / file)
        assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    del weights["decoder.conv_in.conv.bias"]
    save_file(weights, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match=r"vae\.safetensors does not fit .*decoder\.conv_in\.conv\.bias"):
        build(Reference("vae/vae_small").case, ckpt_path=tmp_path / "vae.safetensors")


def test_unfit_options_are_refused():
    case = Reference("vae/vae_small").case
    encoder = case["first_stage_config"]["params"]["encoder_config"]
    for options in ({"attn_resolutions": [16]}, {"temporal_compress_times": 3}, {"temporal_compress_times": 16}):
        with pytest.raises(UserError, match=next(iter(options))):
            instantiate_from_config({**encoder, "params": {**encoder["params"], **options}})


def test_norm_groups():
    """As many groups as asked for, in every norm; more channels than 32 are not needed then."""
    sizes = {"ch": 8, "ch_mult": (1, 2), "num_res_blocks": 0, "z_channels": 4, "temporal_compress_times": 2}
    coders = [coder(**sizes, norm_groups=4) for coder in (ContextParallelEncoder3D, ContextParallelDecoder3D)]
    norms = [module for coder in coders for module in coder.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {4}
    moments = coders[0](seeded_input("video", (1, 3, 5, 16, 16), 0))
    assert coders[1](moments[:, :4]).shape == (1, 3, 5, 16, 16)
    with pytest.raises(UserError, match="norm_groups: 3 groups do not divide the 8 channels"):
        ContextParallelEncoder3D(**sizes, norm_groups=3)


def test_weights_on_a_gpu_have_the_layout_of_what_they_convolve():
    """The test runs on the meta device; on a CPU weights stay, for single taps."""
    vae = build(Reference("vae/vae_small").case)
    weight = vae.encoder.mid.block_1.conv1.conv.weight
    vae.lay_out_weights()
    assert vae.encoder.mid.block_1.conv1.conv.weight is weight and weight.is_contiguous()
    vae.to("meta").lay_out_weights()
    assert vae.encoder.mid.block_1.conv1.conv.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_last_layer(vae):
    assert vae.get_last_layer() is vae.decoder.conv_out.conv.weight


NEUTRAL = {"resamp_with_conv": True, "pad_mode": "first", "give_pre_end": False, "add_conv": False, "zq_ch": 16}


@pytest.mark.parametrize("coder", [ContextParallelEncoder3D, ContextParallelDecoder3D])
def test_settings_of_other_configurations_hold_at_the_values_that_are_always_so(coder):
    sizes = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 16, "temporal_compress_times": 2}
    plain, told = coder(**sizes), coder(**sizes, **NEUTRAL)
    assert told.state_dict().keys() == plain.state_dict().keys()
    others = {"resamp_with_conv": False, "pad_mode": "constant", "give_pre_end": True, "add_conv": True, "zq_ch": 8}
    for key, value in others.items():
        with pytest.raises(UserError, match=f"^{key}: .*; remove it"):
            coder(**sizes, **{key: value})


# Behaviour on a GPU


def adds_bias_later(convolve):
    def run(x, weight, bias=None, **options):
        y = convolve(x, weight, **options)
        return y if bias is None else y.add_(bias.reshape(-1, *[1] * (y.ndim - 2)))

    return run


@pytest.mark.parametrize("at_once", others_long(4, None, 16))
@torch.no_grad()
@pytest.mark.slow
def test_biases_and_products_that_are_left_to_what_follows(monkeypatch, at_once):
    """Norms and sums add them, as on a GPU: the same numbers, also in bfloat16."""
    for name in ("conv2d", "conv3d"):  # with a pass for the bias, as PyTorch has it there
        monkeypatch.setattr(torch.nn.functional, name, adds_bias_later(getattr(torch.nn.functional, name)))
    clip, latent = seeded_input("video", (1, 3, 9, 32, 32)).clamp(-1, 1), seeded_input("latent", (1, 16, 5, 4, 4))
    vae = seed_module_(build(Reference("vae/vae_small").case))

    def results(dtype: torch.dtype, leaves: bool) -> list[torch.Tensor]:
        monkeypatch.setattr(convolutions, "leaves_bias", lambda _: leaves)
        for module in (convolutions, residual_block):
            monkeypatch.setattr(module, "stay_unwritten", lambda *_: leaves)
        vae.to(dtype).use_frames_at_once(at_once)
        encoded = vae.encode(clip.to(dtype), unregularized=True)[0]
        return [encoded.double(), torch.cat(list(vae.decode_chunks(latent.to(dtype))), dim=2).double()]

    half = [results(torch.bfloat16, leaves) for leaves in (False, True)]
    seed_module_(vae.float())
    single = [results(torch.float32, leaves) for leaves in (False, True)]
    wide = [results(torch.float64, leaves) for leaves in (False, True)]
    for index in range(2):
        exact = wide[0][index]
        assert_close(wide[1][index], exact, 1e-10)
        assert_close(single[1][index], single[0][index], 1e-5)
        as_before, left = (relative_error(each[index], exact) for each in half)
        assert left <= as_before


@torch.no_grad()
@pytest.mark.slow
def test_causal_frames_are_kept_as_they_are_written(monkeypatch):
    """By the norm that writes them, or copied for the next chunk: the same."""
    z = latent(7).double()
    wide = seed_module_(build(Reference("vae/vae_small").case)).double()
    written = list(wide.decode_chunks(z))
    monkeypatch.setattr(Chunk, "copies_tail", lambda *_: False)
    copied = list(wide.decode_chunks(z))
    assert len(written) > 2 and all(torch.equal(one, two) for one, two in zip(written, copied, strict=True))


@torch.no_grad()
@pytest.mark.slow
def test_autocast_without_gradients(monkeypatch):
    """As in a VAE's training in bf16-mixed: float32 weights, and activations of both kinds."""
    monkeypatch.setattr(convolutions, "leaves_bias", lambda _: True)
    vae = seed_module_(build(Reference("vae/vae_small").case))
    expected = vae.encode(video(9), unregularized=True)[0], torch.cat(list(vae.decode_chunks(latent(3))), dim=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = vae.encode(video(9), unregularized=True)[0], torch.cat(list(vae.decode_chunks(latent(3))), dim=2)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one.float(), other) < 0.05
