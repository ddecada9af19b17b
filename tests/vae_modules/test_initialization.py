"""Initial weights of encoder and decoder give a signal of constant scale."""

import pytest
import torch

from seeded import seeded_input
from sgm.modules.autoencoding.clip import Chunk
from vae_modules.convolutions import CausalConv3d
from vae_modules.cp_enc_dec import ContextParallelDecoder3D, ContextParallelEncoder3D
from vae_modules.residual_block import ResnetBlock3D

SIZES = {"ch": 32, "z_channels": 4, "ch_mult": (1, 2, 2), "num_res_blocks": 2, "temporal_compress_times": 4}


@pytest.fixture
def coders() -> tuple[ContextParallelEncoder3D, ContextParallelDecoder3D]:
    torch.manual_seed(0)
    return ContextParallelEncoder3D(**SIZES), ContextParallelDecoder3D(**SIZES)


def test_blocks_start_as_the_identity(coders):
    blocks = [block for coder in coders for block in coder.modules() if isinstance(block, ResnetBlock3D)]
    for block in blocks:
        channels = block.conv1.conv.in_channels
        x, z = seeded_input("x", (1, channels, 3, 4, 4), 0), seeded_input("z", (1, 4, 3, 2, 2), 0)
        if channels == block.conv1.conv.out_channels:
            condition = (z,) if hasattr(block.norm1, "conv_y") else ()
            assert torch.equal(block(x, Chunk(lead=True), *condition), x)
    assert len(blocks) > 10


def test_latents_start_of_unit_size_and_nearly_without_noise(coders):
    moments = coders[0](seeded_input("video", (2, 3, 5, 32, 32), 0).clamp(-1, 1))
    mean, log_variance = moments.chunk(2, dim=1)
    assert 0.3 < mean.std() < 3
    assert (log_variance.exp().mean() / mean.var()).sqrt() < 0.5


def test_every_latent_shows_in_the_first_reconstruction(coders):
    """The latent causes as much variation as possible; all but block weights have gradients."""
    z = seeded_input("latent", (2, 4, 2, 8, 8), 0).requires_grad_()
    video = coders[1](z)
    assert 0.1 < video.std() < 10
    (video * seeded_input("cotangent", tuple(video.shape), 0)).sum().backward()
    assert (z.grad.abs().amax((0, 2, 3, 4)) > 0).all()
    silent = [name for name, weight in coders[1].named_parameters() if not weight.grad.any()]
    assert all(".block" in name for name in silent)


def test_frames_start_apart(coders):
    """Convolutions only see the present frame, so that frames are independent images."""
    encoder = coders[0]
    for module in encoder.modules():
        if isinstance(module, CausalConv3d) and module.conv.kernel_size[0] > 1:
            assert not module.conv.weight[:, :, :-1].any()
    x = seeded_input("video", (1, 3, 5, 16, 16), 0)
    features = encoder.down[0].block[0](encoder.conv_in(x, Chunk(lead=True)), Chunk(lead=True))
    alone = encoder.conv_in(x[:, :, 3:4], Chunk(lead=True))
    assert torch.allclose(features[:, :, 3:4], alone, atol=1e-5)


def test_kernels_keep_the_variance_of_what_they_get(coders):
    x = seeded_input("x", (1, 32, 3, 32, 32), 0)
    y = coders[0].down[0].block[0].conv1(x, Chunk(lead=True))
    assert 0.8 < y[..., 1:-1, 1:-1].std() / x.std() < 1.25
