"""Patch discriminators see the right patches for every size, and start like DCGAN's."""

import pytest
import torch
from torch import nn

from distributed import run_distributed
from seeded import seeded_input
from sgm.errors import UserError
from sgm.modules.autoencoding.discriminators import ActNorm, NLayerDiscriminator, NLayerDiscriminator3D
from sgm.util import get_obj_from_str
from support import assert_close


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def clip(frames: int, side: int = 32, batch: int = 1) -> torch.Tensor:
    return seeded_input("clip", (batch, 3, frames, side, side))


# ---------------------------------------------------------------- images


def test_keys_are_those_of_released_discriminators():
    state = NLayerDiscriminator().state_dict()
    convolutions = {name: tuple(value.shape) for name, value in state.items() if value.ndim == 4}
    assert convolutions == {
        "main.0.weight": (64, 3, 4, 4),
        "main.2.weight": (128, 64, 4, 4),
        "main.5.weight": (256, 128, 4, 4),
        "main.8.weight": (512, 256, 4, 4),
        "main.11.weight": (1, 512, 4, 4),
    }
    norms = {f"main.{n}.{key}" for n in (3, 6, 9) for key in ("weight", "bias", "running_mean", "running_var")}
    norms |= {f"main.{n}.num_batches_tracked" for n in (3, 6, 9)}
    assert state.keys() == convolutions.keys() | norms | {"main.0.bias", "main.11.bias"}


def test_a_logit_sees_70_by_70_pixels():
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = NLayerDiscriminator(ndf=4).eval()(x)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    seen = x.grad[0].abs().amax(0) > 0
    assert (seen.any(0).sum(), seen.any(1).sum()) == (70, 70)


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("kind", [NLayerDiscriminator, NLayerDiscriminator3D])
def test_smallest_images(kind, n_layers):
    discriminator = kind(ndf=4, n_layers=n_layers).eval()
    side = 3 * 2**n_layers
    shape = (1, 3, 2) if kind is NLayerDiscriminator3D else (1, 3)
    assert discriminator(torch.randn(*shape, side, side)).shape[-2:] == (1, 1)
    with pytest.raises(
        UserError, match=rf"at least {side}x{side} pixels, got {side}x{side - 1}; for smaller images set fewer"
    ):
        discriminator(torch.randn(*shape, side, side - 1))


@pytest.mark.parametrize("kind", [NLayerDiscriminator, NLayerDiscriminator3D])
def test_weights_are_drawn_as_in_dcgan(kind):
    for layer in kind().modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d) and layer.out_channels > 1:
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert layer.weight.mean().abs() < 2e-3
        elif isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
            assert layer.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.3)
            assert (layer.bias == 0).all()


def test_the_other_path_gives_the_same_class():
    assert get_obj_from_str("sgm.modules.autoencoding.lpips.model.model.NLayerDiscriminator") is NLayerDiscriminator


# ---------------------------------------------------------------- activation normalization


def test_actnorm_normalizes_by_its_first_training_batch_and_remembers():
    x = 3 * seeded_input("x", (4, 2, 8, 8)) + torch.tensor([5.0, -7.0])[:, None, None]
    norm = ActNorm(2)
    assert torch.equal(norm.eval()(x), x)

    first = norm.train()(x)
    assert first.mean((0, 2, 3)).abs().max() < 1e-5
    assert_close(first.std((0, 2, 3), correction=0), torch.ones(2), 1e-5)
    assert_close(norm(2 * x), norm.scale * (2 * x + norm.loc), 1e-6)  # not normalized anew

    loaded = ActNorm(2)
    loaded.load_state_dict(norm.state_dict())
    assert torch.equal(loaded.train()(2 * x), norm(2 * x))


def actnorm_after_a_batch(shares: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    norm = ActNorm(2)
    norm(seeded_input("x", (4, 2, 8, 8))[shares[rank]])
    return norm.loc.detach(), norm.scale.detach()


@pytest.mark.distributed
@pytest.mark.slow
def test_actnorm_starts_the_same_on_every_process():
    expected = actnorm_after_a_batch([[0, 1, 2, 3]])
    for actual in run_distributed(actnorm_after_a_batch, 2, [[0, 1], [2, 3]]):
        assert_close(actual[0], expected[0], 1e-5)
        assert_close(actual[1], expected[1], 1e-5)


def test_discriminator_with_actnorm_is_trained():
    discriminator = NLayerDiscriminator(ndf=8, use_actnorm=True)
    discriminator(seeded_input("x", (2, 3, 32, 32))).mean().backward()
    norms = [layer for layer in discriminator.modules() if isinstance(layer, ActNorm)]
    assert len(norms) == 3
    for norm in norms:
        assert norm.initialized == 1
        assert norm.scale.grad.abs().sum() > 0
        assert norm.loc.grad.abs().sum() > 0


# ---------------------------------------------------------------- clips


@pytest.mark.parametrize("frames", [1, 2, 5, 9, 17])
def test_clips_of_any_length_are_judged_and_trained_on(frames):
    discriminator = NLayerDiscriminator3D(ndf=8)
    x = clip(frames).requires_grad_()
    logits = discriminator(x)
    assert logits.shape == (1, 1, -(-frames // 8), 2, 2)
    logits.mean().backward()
    assert (x.grad.abs().amax((0, 1, 3, 4)) > 0).all()  # every frame counts
    assert all(parameter.grad.abs().sum() > 0 for parameter in discriminator.parameters())


def test_a_logit_sees_47_frames():
    discriminator = NLayerDiscriminator3D(ndf=4)
    for layer in discriminator.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.forward = lambda x: x  # its statistics are those of the whole clip
    x = clip(65, side=24).requires_grad_()
    discriminator(x)[0, 0, 4].sum().backward()
    assert (x.grad[0].abs().amax((0, 2, 3)) > 0).sum() == 47


def test_a_clip_is_judged_alone():
    discriminator = NLayerDiscriminator3D(ndf=8).train()
    x = clip(5, batch=3)
    assert_close(discriminator(x)[1:2], discriminator(x[1:2]), 1e-5)


def test_motion_is_seen():
    discriminator = NLayerDiscriminator3D(ndf=8)
    x = clip(5)
    shuffled = x[:, :, [3, 0, 4, 1, 2]]
    difference = (discriminator(x) - discriminator(shuffled)).abs().max()
    assert difference > 0.01 * discriminator(x).std()
