"""A video that the sampling command is making; a failure ends only its own video."""

import logging
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox_sat.sampling.planned_videos import PlannedVideo
from cogvideox_sat.sampling.requests import SampleEvent, SampleRequest
from sgm.errors import UserError
from sgm.memory_errors import describe_shortage, is_out_of_memory

logger = logging.getLogger(__name__)


def no_events() -> Generator[SampleEvent, None, None]:
    """Yield nothing: the events of no request."""
    yield from ()


@dataclass
class VideoInProgress:
    """A planned video and what has been made of it so far.

    Attributes:
        fps: frames per second of the file.
        asked, events: the request to the session and its events, once the request has begun.
        kept: the file that holds the latents until the video is complete.
        full: the video failed because memory is full.
    """

    planned: PlannedVideo
    fps: int = 8
    asked: SampleRequest | None = None
    events: Generator[SampleEvent, None, None] = field(default_factory=no_events)
    latents: Tensor | None = None
    failure: str | None = None
    kept: Path | None = None
    full: bool = False

    @property
    def name(self) -> str:
        """Return the name in the log: the number of the prompt, from 1, and its beginning."""
        return f"prompt {self.planned.request.index + 1} ('{self.planned.request.text:.60}')"

    def drop(self) -> None:
        """End the request, and free its tensors."""
        self.events.close()
        self.asked, self.events, self.latents = None, no_events(), None


def attempt_each(
    videos: Iterable[VideoInProgress],
    stage: Callable[[VideoInProgress], Any],
    remark: Callable[[VideoInProgress], str] | None = None,
    together: bool = False,
    tells: bool = True,
) -> None:
    """Take every video that has not failed through a stage.

    A failure is logged and ends only its own video.

    Args:
        remark: returns the text that is added to the report of a failure.
        together: other processes take part in the stage. A failure that only this process sees is raised.
        tells: this process logs failures, on behalf of those that take part.
    """
    for video in videos:
        if video.failure is not None:
            continue
        try:
            stage(video)
        except Exception as error:
            video.full = is_out_of_memory(error)
            seen_by_all = isinstance(error, UserError) and not video.full
            if together and not seen_by_all:
                raise  # the others wait inside the network: their current call would pair with this one's next call
            video.failure = describe(error)
            where = None if video.full or isinstance(error, UserError) else error
            if remark is not None:
                video.failure += remark(video)
            if tells:
                logger.error("failed: %s: %s", video.name, video.failure, exc_info=where)
        if video.full and torch.cuda.is_available():
            torch.cuda.empty_cache()  # tensors of the failed stage are no longer referenced


def describe(error: Exception) -> str:
    """Return an error in one line."""
    if is_out_of_memory(error) and not isinstance(error, UserError):
        return describe_shortage(error)
    return next(iter(str(error).splitlines()), type(error).__name__)
