"""Clips become scaled latents, and latents clips; test_diffusion_video.py has real VAEs."""

import pytest
import torch
from torch import nn

from cogvideox_sat.engine.latent_coder import LatentCoder
from sgm.errors import UserError
from sgm.models.autoencoder import IdentityFirstStage
from sgm.modules.autoencoding.regularizers import DiagonalGaussianRegularizer
from support import assert_close


def coder(**config) -> LatentCoder:
    made = LatentCoder(config, DiagonalGaussianRegularizer(), torch.float32, "cpu")
    made.first_stage_model = IdentityFirstStage()
    return made


class Halves(nn.Module):
    """A first stage that halves values, and decodes one frame at a time."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def encode(self, x, unregularized=False):
        self.sizes.append(len(x))
        moments = torch.cat((x / 2, torch.full_like(x, -100.0)), dim=1)  # such log-variances leave the means
        return (moments, {}) if unregularized else moments.chunk(2, dim=1)[0]

    def decode_chunks(self, z):
        self.sizes.append(len(z))
        yield from (2 * z).split(1, dim=2)


@pytest.fixture
def halves() -> LatentCoder:
    made = coder(scale_factor=0.5, en_and_decode_n_samples_a_time=2)
    made.first_stage_model = Halves()
    return made


def test_frames_of_either_dtype():
    frames = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 2, 3, 4, 2)
    clip = coder().load_clip(frames)
    assert clip.shape == (1, 3, 2, 4, 2) and clip[0, 0, 0, 0].tolist() == [-1.0, 1.0]
    assert torch.equal(coder().load_clip(clip.transpose(1, 2)), clip)


def test_latents_in_place_of_clips_are_only_scaled():
    latents = torch.randn(2, 3, 16, 4, 4)
    scaled = coder(latent_input=True, scale_factor=0.5).encode_first_stage(latents)
    assert torch.equal(scaled, 0.5 * latents.transpose(1, 2))


def test_a_first_stage_without_chunks_or_moments():
    """Diffusion on pixels: nothing is encoded, whatever the number of samples at a time."""
    clips = torch.randn(2, 3, 9, 4, 4)
    for number in (None, 1):
        made = coder(scale_factor=0.7, en_and_decode_n_samples_a_time=number)
        latents = made.encode_first_stage(clips)
        assert torch.equal(latents, made.scale_factor * clips)
        assert_close(made.decode_first_stage(latents), clips, 1e-6)


def test_samples_are_coded_a_few_at_a_time(halves):
    clips = torch.randn(3, 3, 5, 4, 4)
    means = halves.encode_means(clips)
    assert torch.equal(means, clips / 4)
    assert_close(halves.sample_latent(halves.encode_moments(clips)), means, 1e-6)
    assert torch.equal(halves.decode_first_stage(means), clips)
    assert [chunk.shape for chunk in halves.decode_stream(means)] == [(3, 3, 1, 4, 4)] * 5
    assert halves.first_stage_model.sizes == [2, 1] * 4


def test_a_decoder_of_a_subclass_is_also_the_one_of_the_stream(halves):
    class Own(LatentCoder):
        def decode_first_stage(self, z):
            return -z

    halves.__class__ = Own
    (clip,) = halves.decode_stream(torch.ones(1, 3, 5, 4, 4))
    assert torch.equal(clip, -torch.ones(1, 3, 5, 4, 4))


@pytest.mark.parametrize("wrong", [0, -1, "2", 1.5, True, [1]])
def test_other_numbers_of_samples_are_refused(wrong):
    with pytest.raises(UserError, match=r"model\.en_and_decode_n_samples_a_time: "):
        coder(en_and_decode_n_samples_a_time=wrong)
