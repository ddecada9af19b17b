"""The given frames of a request, frame by frame."""

from functools import partial

import pytest
import torch

from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.sampling.requests import KeyFrame, SampleRequest
from cogvideox_sat.training.given_frames import given_frames

LIMITS = ModelLimits(patch=(1, 2, 2), largest=(13, 60, 90), in_channels=32, latent_channels=16)
BLACK, WHITE = 0, 255
REQUEST = SampleRequest("a boat", seed=1, size=(32, 48), frames=3)


def picture(value: float) -> torch.Tensor:
    return torch.full((3, 32, 48), value)


def values(request: SampleRequest, first: int, count: int) -> list[int]:
    frames = given_frames(request, LIMITS).frames(first, count)
    assert (frames.shape, frames.dtype) == ((count, 32, 48, 3), torch.uint8)
    return frames[:, 0, 0, 0].tolist()


def asked(**changes) -> SampleRequest:
    return SampleRequest(**{**vars(REQUEST), **changes})


def test_a_first_frame_stays():
    assert values(asked(image=partial(picture, 1.0)), 0, 3) == [WHITE] * 3
    assert given_frames(asked(image=picture(1.0)), LIMITS).kind == "image"


def test_pictures_are_shown_from_the_frame_on_that_they_stand_for():
    both = asked(image=picture(-1.0), key_frames=(KeyFrame(picture(1.0), -1),))
    assert values(both, 0, 9) == [BLACK] * 8 + [WHITE]
    assert values(both, 7, 4) == [BLACK] + [WHITE] * 3, "beyond the first window too"
    assert values(asked(key_frames=(KeyFrame(picture(1.0), 4),)), 0, 2) == [WHITE] * 2


def test_a_clip_is_shown_frame_by_frame():
    clip = torch.linspace(-1, 1, 9)[:, None, None, None].expand(-1, 3, 32, 48)
    request = asked(video=lambda: clip, image=picture(1.0))
    assert values(request, 7, 3) == [values(request, 7, 1)[0], WHITE, WHITE]
    assert values(request, 0, 1) == [BLACK]
    assert given_frames(request, LIMITS).kind == "clip"


@pytest.mark.parametrize("changes", [{}, {"video": picture, "extend": ("then",)}])
def test_nothing_is_beside_a_video_that_shows_nothing_or_begins_with_its_clip(changes):
    assert given_frames(asked(**changes), LIMITS) is None
