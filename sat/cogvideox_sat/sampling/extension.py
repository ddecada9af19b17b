"""A video in several windows, each of which goes on from the last frames of the one before.

    clip, or first window   f0 f1 ... f7 f8
    second window                       f4 f5 ... f8 | f9 ... f12
    third window                                  f8 f9 ... f12 | f13 ... f16

The frames that a window goes on from are encoded anew and held while the rest is sampled; the video keeps them as they
were. Only these frames are kept, so that memory does not grow with the number of windows.
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
    """Yield the events of a request that is continued: those of its windows, with one `Result`, whose latents are those
    of the last window. `Progress` counts the steps of all windows, and `Frames` come once each.

    Args:
        sample: gives the events of a request for one window.
        steps_of: gives the number of steps of a request.
    """
    total, done = steps_of(request), 0
    clip = request.load_clip("video", limits) if request.goes_on else None
    tail = torch.empty(0) if clip is None else last_frames(clip)
    result: Result | None = None
    for number in range(int(request.goes_on), 1 + len(request.extend)):
        window = replace(request, extend=()) if number == 0 else continuation(request, number, tail, limits)
        window.check(limits)  # what was decoded may not be finite
        known = CONTEXT_FRAMES if number else 0  # frames of the window that the video has already
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
    """Return the request for window `number`, from 1, which goes on from `frames` (n, 3, height, width)."""
    context = frames.float().clamp(-1, 1).cpu()
    return replace(
        request,
        prompt=request.extend[number - 1],
        seed=derive_seed(request.seed, number),
        extend=(),
        video=None,
        strength=None,
        key_frames=(),
        # An image-to-video model is told the first of them.
        image=context[0] if limits.image_to_video else None,
        context=context,
    )


def last_frames(frames: Tensor) -> Tensor:
    """Return a copy of the frames that the next window goes on from."""
    return frames[-CONTEXT_FRAMES:].clone()
