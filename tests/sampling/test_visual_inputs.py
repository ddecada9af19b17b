"""The visual inputs of a request: clip, key frames and prefix, in all families."""

from dataclasses import replace

import pytest
import torch
from einops import rearrange

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.sampling.requests import Encoded, Frames, KeyFrame, Progress, SampleRequest, SessionSettings
from cogvideox_sat.sampling.session import SamplingSession
from sgm.errors import UserError

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

FAMILIES = ("5b", "1.5", "5b_i2v", "1.5_i2v")
SIZE = (32, 48)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tiny):
    """Return a session, and a request of three steps for 9 frames."""
    config = load_configs([tiny.config(request.param)])
    settings = SessionSettings(config["model"], load=config["args"]["load"], sources=config.sources)
    image = picture(0) if request.param.endswith("i2v") else None
    frames = 4 if request.param.startswith("1.5") else 3
    with SamplingSession(settings) as session:
        yield session, SampleRequest("a boat", seed=3, size=SIZE, frames=frames, steps=3, image=image)


def picture(seed: int) -> torch.Tensor:
    return torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def clip(frames: int = 9) -> torch.Tensor:
    return torch.stack([picture(10 + number) for number in range(frames)])


def latents_of(session: SamplingSession, frames: torch.Tensor) -> torch.Tensor:
    """Return the means (1, t, c, h, w) of a clip's latents."""
    session.load("first_stage_model")
    means = session.engine.encode_means(rearrange(frames, "t c h w -> 1 c t h w"))
    return rearrange(means, "1 c t h w -> 1 t c h w")


def sampled(session, request):
    *_, result = session.sample(request)
    return result.latents


def test_strength_one_leaves_nothing_of_the_clip(case):
    """To the bit, since the released schedules end without signal."""
    session, request = case
    assert torch.equal(sampled(session, replace(request, video=clip(), strength=1.0)), sampled(session, request))


def test_strength_zero_gives_the_clip_as_it_is_encoded(case):
    session, request = case
    events = list(session.sample(replace(request, video=clip(), strength=0.0)))
    latents = events[-1].latents
    assert torch.equal(latents, latents_of(session, clip())) and not any(isinstance(e, Progress) for e in events)
    frames = torch.cat([event.frames for event in events if isinstance(event, Frames)])
    decoded = session.engine.decode_first_stage(rearrange(latents, "1 t c h w -> 1 c t h w"))
    assert torch.equal(frames, decoded[0].transpose(0, 1))


def test_a_share_of_the_steps_is_taken(case):
    """Fewer steps give a result nearer to the clip, which may come late."""
    session, request = case
    asked = []
    late = replace(request, video=lambda: asked.append(1) or clip(), strength=0.67)
    events = session.sample(late)
    assert next(events) == Encoded("prompt") and not asked
    events = list(events)
    assert events[0] == Encoded("image" if request.image is not None else "video") and asked == [1]
    assert [(e.step, e.steps) for e in events if isinstance(e, Progress)] == [(1, 2), (2, 2)]
    assert session.steps_taken(late) == 2
    original = latents_of(session, clip())
    away = [(sampled(session, replace(late, strength=s)) - original).norm() for s in (0.34, 0.67, 1.0)]
    assert 0 < away[0] < away[2]


def test_a_clip_changes_no_random_number(case):
    """Strength 1 has shown it; neither does how the clip is encoded."""
    session, request = case
    state = torch.get_rng_state()
    first = sampled(session, replace(request, video=clip(), strength=0.67))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sampled(session, replace(request, video=clip(), strength=0.67)), first)


def test_frames_to_go_on_from_are_held(case):
    session, request = case
    context = clip(5)
    latents = sampled(session, replace(request, context=context))
    assert torch.equal(latents[:, :2], latents_of(session, context))
    assert not torch.equal(latents, sampled(session, request))


def test_key_frames(case):
    session, request = case
    if request.image is None:
        with pytest.raises(UserError, match="keyframes: this is a text-to-video model; leave out the first frame"):
            session.sample(replace(request, key_frames=(KeyFrame(picture(0), 0),)))
        return
    plain = sampled(session, request)
    alone = replace(request, image=None, key_frames=(KeyFrame(picture(0), 0),))
    assert torch.equal(sampled(session, alone), plain), "only the first frame is today's image-to-video, to the bit"
    last = replace(request, key_frames=(KeyFrame(lambda: picture(5), -1),))
    assert not torch.equal(sampled(session, last), plain)
    named = replace(request, image=None, key_frames=(KeyFrame(picture(5), 8), KeyFrame(picture(0), 0)))
    assert torch.equal(sampled(session, named), sampled(session, last)), (
        "in whatever order, and counted from either end"
    )
    for at, says in (
        (9, "keyframes: at: got 9; the video has 9 frames, expected a number from -9 to 8"),
        (-10, "keyframes: at: got -10"),
        (0.5, "keyframes: at: got 0.5"),
        (0, "keyframes: the one at 0 is in the same 4 frames as the first frame"),
    ):
        with pytest.raises(UserError, match=says):
            session.sample(replace(request, key_frames=(KeyFrame(picture(5), at),)))
    with pytest.raises(UserError, match="keyframes: got float32 of shape"):
        session.sample(replace(request, key_frames=(KeyFrame(picture(5)[:, 1:], -1),)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strength": 1.5, "video": clip()}, "strength: got 1.5; expected a number from 0 to 1"),
        ({"strength": 0.5}, "strength: `video` is missing; give `video` too"),
        ({"video": clip(8)}, "video: the clip has 8 frames; expected 9"),
        ({"video": clip()[..., 1:]}, "video: got float32 of shape"),
        ({"video": 3 * clip()}, r"video: values lie outside \[-1, 1\]"),
        ({"context": clip(9)}, r"context: the clip has 9 frames; expected 4k \+ 1, fewer than 9"),
        ({"context": clip(4)}, "context: the clip has 4 frames"),
        ({"extend": "more"}, "extend: got .more.; expected a tuple of prompts"),
        ({"extend": ("more",), "frames": 1}, "extend: a window has 1 frames; expected more than 5"),
        ({"extend": ("more",), "video": clip(4)}, "video: the clip has 4 frames; expected at least 5"),
    ],
)
def test_clips_that_do_not_fit_are_refused_at_once(case, changes, says):
    session, request = case
    if "frames" in changes:
        changes = {**changes, "frames": 1 + session.limits.extra_frames}
    with pytest.raises(UserError, match=says):
        session.sample(replace(request, **changes))


def test_a_clip_that_comes_late_is_checked_then(case):
    session, request = case
    with pytest.raises(UserError, match="video: the clip has 3 frames; expected 9"):
        list(session.sample(replace(request, video=lambda: clip(3))))
