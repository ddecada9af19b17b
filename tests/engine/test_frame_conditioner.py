"""Given frames stand in their latent frames; test_diffusion_video.py has real VAEs."""

import pytest
import torch

from cogvideox_sat.engine.frame_conditioner import FrameConditioner
from sgm.errors import UserError
from sgm.modules.autoencoding.regularizers import DiagonalGaussianRegularizer
from support import assert_close


def conditioner(patch: int = 1, **config) -> FrameConditioner:
    params = {"patch_size": [patch, 2, 2], "out_channels": 4}
    config = {"noised_image_input": True, "network_config": {"params": params}, "scale_factor": 0.5, **config}
    return FrameConditioner(config, DiagonalGaussianRegularizer(), torch.float32, "cpu")


FIRST, LAST = torch.randn(2, 2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def test_key_frames_stand_in_their_latent_frames():
    """A first frame alone gives the usual condition; 1.5 models sample a leading frame."""
    zeros = torch.zeros_like(FIRST)
    for patch, between in ((1, 1), (2, 2)):
        made, frames = conditioner(patch), 2 + between
        assert torch.equal(made.concat_key_frames({0: FIRST}, frames), made.concat_condition(FIRST, frames))
        both = made.concat_key_frames({0: FIRST, 2: LAST}, frames)
        assert torch.equal(both, torch.cat((FIRST, *[zeros] * between, LAST), dim=1))


def test_models_that_take_fewer_frames():
    repeating = conditioner(noised_image_all_concat=True)
    assert torch.equal(repeating.concat_condition(FIRST, 3), FIRST.expand(2, 3, 4, 2, 2))
    with pytest.raises(UserError, match="keyframes: this model takes only the first frame"):
        repeating.concat_key_frames({2: LAST}, 4)
    with pytest.raises(UserError, match="keyframes: this is a text-to-video model"):
        conditioner(noised_image_input=False).concat_key_frames({0: FIRST, 2: LAST}, 4)
    with pytest.raises(UserError, match="keyframes: this is a text-to-video model"):
        conditioner(noised_image_input=False, conditioning={"first_last": 1})


def test_the_extra_frame_of_1_5_models():
    latents = torch.randn(1, 3, 4, 2, 2)
    for patch, frames in ((1, 3), (2, 4)):
        made = conditioner(patch)
        more = made.with_extra_frame(latents)
        assert more.shape[1] == frames and torch.equal(made.drop_extra_frame(more), latents)


@pytest.mark.parametrize("patch", [1, 2])
def test_which_frames_of_a_clip_are_given(patch):
    """Without chance the most frequent kind; 1.5 models take unscaled latents."""
    means = torch.randn(2, 4, 2, 2, 2)
    moments = torch.cat((means, torch.full_like(means, -100.0)), dim=1)  # such log-variances leave the means
    asked = []

    def moments_of(mask):
        asked.append(mask)
        return moments

    made = conditioner(patch, conditioning={"first": 1, "first_last": 2})
    given = made.with_key_frames(FIRST, 3, False, moments_of)
    assert asked[0].tolist() == [[False, True]] * 2
    assert torch.equal(given[:, :1], FIRST) and not given[:, 1].any()
    assert_close(given[:, 2], means[:, :, 1] * (made.scale_factor if patch == 1 else 1.0), 1e-6)
    assert conditioner().with_key_frames(FIRST, 3, True, moments_of) is FIRST
    assert len(asked) == 1


def test_key_frames_are_encoded_one_by_one():
    """The last frame of each latent frame but the first, only where it is wanted."""
    made = conditioner()
    pictures = []

    def encode_moments(x):
        pictures.append(x)
        return x.new_ones(len(x), 8, 1, 2, 2) * x[:, :1, :, :1, :1]

    made.encode_moments = encode_moments
    clip = torch.arange(9.0).view(1, 1, 9, 1, 1).expand(2, 3, 9, 16, 16)
    wanted = torch.tensor([[True, False], [True, True]])
    moments = made.encode_key_frames(clip, wanted, noise=False)
    assert pictures[0].shape == (3, 3, 1, 16, 16) and moments.shape == (2, 8, 2, 2, 2)
    assert moments[:, 0, :, 0, 0].tolist() == [[4.0, 0.0], [4.0, 8.0]]
    assert not made.encode_key_frames(clip, torch.zeros_like(wanted), noise=False).any() and len(pictures) == 1
