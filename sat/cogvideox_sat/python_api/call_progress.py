"""Report the progress of a call, to a function or as a bar."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cogvideox_sat.sampling.planned_videos import PlannedVideo
from cogvideox_sat.sampling.requests import SampleRequest
from cogvideox_sat.sampling.session import SamplingSession


@dataclass(frozen=True)
class Update:
    """The progress of a call.

    Attributes:
        stage: the current or next stage: `text`, `image` (or `video`), `sampling`, `decoding`, or `done`.
        step, steps: completed and total sampling steps of this video; `step` is 0 before the first one.
        video, videos: index of the video, from 0, and number of videos of the call.
        denoised: after a step, the current estimate of the video's `latents`, on the pipeline's device, which must not
            be changed; see `Pipeline.preview`. It costs nothing. None: no estimate exists yet, or the sampler reports
            none.
    """

    stage: str
    step: int
    steps: int
    video: int
    videos: int
    denoised: Tensor | None = None


@contextmanager
def reporting(
    progress: Callable[[Update], None] | bool | None,
    jobs: Sequence[tuple[PlannedVideo, SampleRequest]],
    session: SamplingSession,
) -> Iterator[Callable[..., None]]:
    """Yield the function that reports the progress of a call, with `Update`'s attributes.

    Args:
        progress: called with each `Update`; True: a bar; False: nothing; None: a bar if there is someone to see it.
        jobs: the videos of the call.
        session: counts their steps.
    """
    if callable(progress):
        yield lambda *values, **named: progress(Update(*values, **named))
        return
    if progress is False or (progress is None and not is_interactive()):
        yield lambda *values, **named: None
        return
    from tqdm.auto import tqdm

    total = sum(session.steps_taken(asked) for _, asked in jobs)
    with tqdm(total=total, desc="sampling", unit="step") as bar:

        def count(stage: str, step: int, steps: int, denoised: Tensor | None = None, **_: Any) -> None:
            if denoised is not None or (stage == "sampling" and step):
                bar.update()

        yield count


def is_interactive() -> bool:
    """Return whether the output is a notebook or a terminal."""
    return "ipykernel" in sys.modules or sys.stderr.isatty()
