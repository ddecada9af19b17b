"""A video in several windows: what each goes on from, and what comes of it."""

from dataclasses import replace

import pytest
import torch

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.sampling.extension import extended
from cogvideox_sat.sampling.requests import (
    Encoded,
    Frames,
    Latents,
    Progress,
    Result,
    SampleRequest,
    SessionSettings,
)
from cogvideox_sat.sampling.session import SamplingCancelled, SamplingSession
from long_cases import others_long
from sgm.seeds import derive_seed

SIZE = (16, 16)
LIMITS = ModelLimits(patch=(1, 2, 2), largest=(3, 8, 8), in_channels=16, latent_channels=16)
OF_IMAGES = replace(LIMITS, in_channels=32)
REQUEST = SampleRequest("first", seed=7, size=SIZE, frames=3, steps=2, extend=("second", "third"))


def shade(value: float) -> torch.Tensor:
    return torch.full((3, *SIZE), value)


class Windows:
    """Stands for a session: frame n of window w is the number 0.1 w + 0.01 n.

    The frames that it continues come first.
    """

    def __init__(self, chunks: tuple[int, ...] = (1, 4, 4)):
        self.requests: list[SampleRequest] = []
        self.chunks = chunks
        self.open = 0

    def __call__(self, request: SampleRequest):
        number = len(self.requests)
        self.requests.append(request)
        frames = torch.stack([shade(0.1 * number + 0.01 * n) for n in range(9)])
        self.open += 1
        try:
            yield Encoded("prompt")
            yield Progress(1, 2)
            yield Progress(2, 2)
            yield Latents(torch.zeros(1) + number)
            for chunk in frames.split(list(self.chunks)):
                yield Frames(chunk)
            yield Result(torch.zeros(1) + number, replace(request, steps=2))
        finally:
            self.open -= 1


def steps_of(request: SampleRequest) -> int:
    return 2 * (len(request.extend) + (not request.goes_on))


def values(events: list) -> list[float]:
    return [round(frame.mean().item(), 2) for event in events if isinstance(event, Frames) for frame in event.frames]


@pytest.mark.parametrize("chunks", [(9,), (1, 4, 4), (3, 3, 3), (1,) * 9])
def test_frames_come_once_each(chunks):
    windows = Windows(chunks)
    events = list(extended(REQUEST, LIMITS, windows, steps_of))
    later = [round(0.1 * window + 0.01 * n, 2) for window in (1, 2) for n in range(5, 9)]
    assert values(events) == [*(round(0.01 * n, 2) for n in range(9)), *later]
    assert [(e.step, e.steps) for e in events if isinstance(e, Progress)] == [(n, 6) for n in range(1, 7)]
    (result,) = (event for event in events if isinstance(event, Result))
    assert result is events[-1] and result.latents == 2 and result.request.extend == REQUEST.extend


def test_windows_go_on_from_the_last_frames_before_them():
    windows = Windows()
    list(extended(REQUEST, LIMITS, windows, steps_of))
    first, second, third = windows.requests
    assert first.context is None and not first.extend
    assert [request.prompt for request in windows.requests] == ["first", "second", "third"]
    assert [request.seed for request in windows.requests] == [derive_seed(7, number) for number in range(3)]
    assert torch.equal(second.context, torch.stack([shade(0.01 * n) for n in range(4, 9)]))
    expected = [0.08, 0.15, 0.16, 0.17, 0.18]
    assert [round(frame.mean().item(), 2) for frame in third.context] == expected
    assert second.image is None


def test_an_image_to_video_model_is_told_the_first_of_them():
    windows = Windows()
    list(extended(replace(REQUEST, image=shade(0.5)), OF_IMAGES, windows, steps_of))
    first, second, _ = windows.requests
    assert torch.equal(first.image, shade(0.5)) and torch.equal(second.image, second.context[0])


def test_a_clip_stays_as_it_is_and_is_continued():
    """A clip of any length is continued unchanged; sampling uses only its end."""
    clip = torch.stack([shade(-0.5 - 0.01 * n) for n in range(12)])
    windows = Windows()
    events = list(extended(replace(REQUEST, video=lambda: clip), LIMITS, windows, steps_of))
    assert values(events)[:12] == [round(-0.5 - 0.01 * n, 2) for n in range(12)]
    assert values(events)[12:] == [0.05, 0.06, 0.07, 0.08, 0.15, 0.16, 0.17, 0.18]
    second, _ = windows.requests
    assert second.prompt == "second" and second.video is None and torch.equal(second.context, clip[-5:])
    assert [(e.step, e.steps) for e in events if isinstance(e, Progress)] == [(n, 4) for n in range(1, 5)]


def test_a_clip_with_a_strength_is_sampled_from_first():
    clip = torch.zeros(9, 3, *SIZE)
    windows = Windows()
    list(extended(replace(REQUEST, video=clip, strength=0.5), LIMITS, windows, steps_of))
    assert windows.requests[0].video is clip and windows.requests[0].strength == 0.5
    assert windows.requests[1].video is None and windows.requests[1].strength is None


def test_closing_ends_the_window():
    windows = Windows()
    events = extended(REQUEST, LIMITS, windows, steps_of)
    next(events)
    assert windows.open == 1
    events.close()
    assert windows.open == 0


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", others_long("5b", "1.5_i2v"))
def test_with_a_model(tiny, family):
    """The first window is the plain video; memory has one window; cancelling ends all."""
    config = load_configs([tiny.config(family)])
    settings = SessionSettings(config["model"], load=config["args"]["load"], sources=config.sources)
    image = torch.zeros(3, 32, 48) if family.endswith("i2v") else None
    frames = 4 if family.startswith("1.5") else 3
    request = SampleRequest("a boat", seed=3, size=(32, 48), frames=frames, steps=2, image=image)
    with SamplingSession(settings) as session:
        alone = torch.cat([e.frames for e in session.sample(request) if isinstance(e, Frames)])
        longer = replace(request, extend=("a boat at night", "a boat at dawn"))
        events = list(session.sample(longer))
        shown = torch.cat([event.frames for event in events if isinstance(event, Frames)])
        assert len(shown) == 9 + 2 * 4 and torch.equal(shown[:9], alone)
        assert session.steps_taken(longer) == 6
        assert [event.step for event in events if isinstance(event, Progress)] == [1, 2, 3, 4, 5, 6]
        again = torch.cat([e.frames for e in session.sample(longer) if isinstance(e, Frames)])
        assert torch.equal(again, shown)

        events = session.sample(longer)
        for event in events:
            if isinstance(event, Progress) and event.step == 3:
                session.cancel()
                break
        with pytest.raises(SamplingCancelled):
            list(events)
        assert len(torch.cat([e.frames for e in session.sample(request) if isinstance(e, Frames)])) == 9
