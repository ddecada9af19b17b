"""Videos in several windows, each of which continues the last frames of the window before.

    clip, or first window   f0 f1 ... f7 f8
    second window                       f4 f5 ... f8 | f9 ... f12
    third window                                  f8 f9 ... f12 | f13 ... f16

The frames that a window continues are encoded again and held fixed while the rest is sampled; the video keeps the
original frames. Only these frames are kept in memory, so that memory does not grow with the number of windows.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor

from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.latent_geometry import CONTEXT_FRAMES
from cogvideox_sat.sampling.requests import Frames, Progress, Result, SampleEvent, SampleRequest
from sgm.seeds import derive_seed


def extended(
    request: SampleRequest,
    limits: ModelLimits,
    sample: Callable[[SampleRequest], Generator[SampleEvent, None, None]],
    steps_of: Callable[[SampleRequest], int],
) -> Generator[SampleEvent, None, None]:
    """Yield the events of a request whose video is continued in further windows.

    The events are those of all windows, with one `Result`, whose latents are those of the last window. `Progress`
    counts the steps of all windows; each frame occurs once in `Frames`.

    Args:
        sample: returns the events of a request for one window.
        steps_of: returns the number of steps of a request.
    """
    total, done = steps_of(request), 0
    clip = request.load_clip("video", limits) if request.goes_on else None
    tail = torch.empty(0) if clip is None else last_frames(clip)
    result: Result | None = None
    for number in range(int(request.goes_on), 1 + len(request.extend)):
        window = replace(request, extend=()) if number == 0 else continuation(request, number, tail, limits)
        window.check(limits)  # decoded frames may not be finite
        known = CONTEXT_FRAMES if number else 0  # frames of the window that the video already has
        with closing(sample(window)) as events:
            for event in events:
                if isinstance(event, Progress):
                    yield replace(event, step=done + event.step, steps=total)
                elif isinstance(event, Frames):
                    if clip is not None:
                        yield Frames(clip)
                        clip = None
                    new = event.frames[known:]
                    known = max(known - len(event.frames), 0)
                    tail = last_frames(torch.cat((tail.to(new), new)) if len(tail) else new)
                    if len(new):
                        yield Frames(new)
                elif isinstance(event, Result):
                    result = event
                else:
                    yield event
        done += steps_of(window)
    assert result is not None, "there is one window at least"
    yield Result(result.latents, replace(request, steps=result.request.steps))


def continuation(request: SampleRequest, number: int, frames: Tensor, limits: ModelLimits) -> SampleRequest:
    """Return the request for one further window.

    Args:
        number: number of the window, from 1.
        frames: the frames (n, 3, height, width) that the window continues.
    """
    context = frames.float().clamp(-1, 1).cpu()
    return replace(
        request,
        prompt=request.extend[number - 1],
        seed=derive_seed(request.seed, number),
        extend=(),
        video=None,
        strength=None,
        key_frames=(),
        # An image-to-video model takes the first of these frames as its image.
        image=context[0] if limits.image_to_video else None,
        context=context,
    )


def last_frames(frames: Tensor) -> Tensor:
    """Return a copy of the frames that the next window continues."""
    return frames[-CONTEXT_FRAMES:].clone()
