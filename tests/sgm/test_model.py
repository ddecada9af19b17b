"""The 2D encoder and decoder equal the reference numbers and diffusers."""

import pytest
import torch
from torch import nn

from diffusers_image_vae import diffusers_name, diffusers_weights
from seeded import seed_module_, seeded_input
from sgm.errors import UserError
from sgm.modules.diffusionmodules.model import Decoder, Encoder
from sgm.util import instantiate_from_config
from support import Reference, assert_close

TINY = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4, "resolution": 16}


def coder(**params) -> nn.Module:
    """Return an `encoder` and a `decoder` of these arguments."""
    both = nn.Module()
    both.encoder, both.decoder = Encoder(**params), Decoder(**params)
    return both


def images(*shape: int) -> torch.Tensor:
    return seeded_input("image", shape).clamp(-1, 1)


def test_reference():
    reference = Reference("autoencoder_2d")
    params = reference.case["config"]["params"]
    both = coder(**params["ddconfig"])
    both.quant_conv = nn.Conv2d(8, 2 * params["embed_dim"], 1)
    both.post_quant_conv = nn.Conv2d(params["embed_dim"], 4, 1)
    assert {name: list(value.shape) for name, value in both.state_dict().items()} == reference.case["keys"]
    seed_module_(both, reference.case["seed"])
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            moments = both.quant_conv(both.encoder(images(2, 3, 32, 32)))
            mean = moments.chunk(2, dim=1)[0]
            image = both.decoder(both.post_quant_conv(mean))
        assert_close(mean, reference["z"], 1e-5)
        assert_close(image, reference["x"], 1e-5)


def as_diffusers(both: nn.Module) -> nn.Module:
    from diffusers import AutoencoderKL

    other = AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    other.load_state_dict(diffusers_weights(both.state_dict(), levels=3))
    return other.eval()


def test_values_and_gradients_agree_with_diffusers():
    """With three levels, two blocks each, and images that are no squares."""
    both = seed_module_(coder(ch=32, ch_mult=(1, 2, 2), num_res_blocks=2, z_channels=4, resolution=16))
    other = as_diffusers(both)
    x, z = images(2, 3, 24, 16).requires_grad_(), seeded_input("latent", (2, 4, 6, 4)).requires_grad_()
    for ours, others, leaf, part in (
        (both.encoder(x), other.encoder(x), x, "encoder"),
        (both.decoder(z), other.decoder(z), z, "decoder"),
    ):
        assert_close(ours, others, 1e-5)
        cotangent = seeded_input(f"{part}.cotangent", ours.shape)
        names, parameters = zip(*getattr(both, part).named_parameters(), strict=True)
        theirs = dict(getattr(other, part).named_parameters())
        gradients = torch.autograd.grad(ours, [leaf, *parameters], cotangent)
        expected = torch.autograd.grad(
            others, [leaf, *(theirs[diffusers_name(name, levels=3)] for name in names)], cotangent
        )
        for name, one, two in zip(["input", *names], gradients, expected, strict=True):
            # A bias right before a norm of one channel a group has no effect: its gradient is rounding.
            assert (one.flatten() - two.flatten()).norm() <= 1e-4 * two.norm() + 1e-3, name


@pytest.mark.parametrize("attn_type", ["vanilla", "vanilla-xformers", "linear", "none"])
@pytest.mark.parametrize("resamp_with_conv", [True, False])
def test_every_kind_of_layer_learns(attn_type, resamp_with_conv):
    """Every parameter gets a gradient, and the shapes are those promised."""
    both = seed_module_(
        coder(
            **TINY,
            attn_type=attn_type,
            attn_resolutions=[8],
            resamp_with_conv=resamp_with_conv,
            in_channels=1,
            out_ch=2,
        )
    )
    moments = both.encoder(images(2, 1, 8, 12))
    assert moments.shape == (2, 8, 4, 6)
    image = both.decoder(moments[:, :4])
    assert image.shape == (2, 2, 8, 12)
    (image * seeded_input("cotangent", image.shape)).sum().backward()
    for name, parameter in both.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    names = [name for name, _ in both.named_parameters()]
    assert any("down.1.attn.0" in name for name in names) == (attn_type != "none")
    assert not any("down.0.attn" in name for name in names)
    assert any("sample.conv" in name for name in names) == resamp_with_conv


def test_both_kinds_of_vanilla_attention_and_of_naming_the_linear_one_are_the_same():
    x = images(1, 3, 16, 16)
    plain, efficient = (seed_module_(Encoder(**TINY, attn_type=kind)) for kind in ("vanilla", "vanilla-xformers"))
    assert torch.equal(plain(x), efficient(x))
    linear, short = (
        seed_module_(Encoder(**TINY, attn_type="linear")),
        seed_module_(Encoder(**TINY, use_linear_attn=True)),
    )
    assert torch.equal(linear(x), short(x)) and not torch.equal(linear(x), plain(x))


def test_options_of_the_output():
    z = seeded_input("latent", (1, 4, 4, 4))
    plain, squashed, features = (
        seed_module_(Decoder(**TINY, **options)) for options in ({}, {"tanh_out": True}, {"give_pre_end": True})
    )
    assert torch.equal(squashed(z), plain(z).tanh())
    assert torch.equal(plain.conv_out(nn.functional.silu(plain.norm_out(features(z)))), plain(z))
    assert plain.get_last_layer() is plain.conv_out.weight
    assert Encoder(**TINY, double_z=False)(images(1, 3, 8, 8)).shape == (1, 4, 4, 4)


def test_what_does_not_fit_is_said_in_one_line():
    with pytest.raises(UserError, match="height and width: got 17x16; it must be multiples of 2"):
        Encoder(**TINY)(torch.zeros(1, 3, 17, 16))
    with pytest.raises(UserError, match="attn_type: 'fast' is unknown; use one of 'vanilla', 'vanilla-xformers'"):
        Decoder(**TINY, attn_type="fast")
    with pytest.raises(UserError, match=r"params\.chanels: unknown; did you mean z_channels\?"):
        instantiate_from_config(
            {"target": "sgm.modules.diffusionmodules.model.Encoder", "params": {**TINY, "chanels": 3}}
        )
