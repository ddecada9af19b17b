"""A failure ends its own video, or the process if processes share a network."""

from types import SimpleNamespace

import pytest
import torch

from cogvideox_sat.sampling.video_in_progress import VideoInProgress, attempt_each
from sgm.errors import UserError


def videos(count: int) -> list[VideoInProgress]:
    return [
        VideoInProgress(SimpleNamespace(request=SimpleNamespace(index=i, text=f"prompt {i}"))) for i in range(count)
    ]


def failing_with(error: Exception, index: int = 0):
    def stage(video: VideoInProgress) -> None:
        if video.planned.request.index == index:
            raise error
        video.latents = torch.ones(1)

    return stage


@pytest.mark.parametrize(
    ("error", "with_traceback"),
    [(UserError("bad image"), False), (RuntimeError("odd"), True), (torch.OutOfMemoryError("full"), False)],
)
def test_a_failure_ends_its_own_video(error, with_traceback, caplog):
    both = videos(2)
    attempt_each(both, failing_with(error))
    assert both[0].failure and both[1].failure is None and both[1].latents is not None
    assert "failed: prompt 1 ('prompt 0')" in caplog.text
    assert bool(caplog.records[0].exc_info) == with_traceback


def test_a_process_that_fails_beside_others_ends():
    """Its next all-reduce would meet another one of its partners, and give wrong videos."""
    with pytest.raises(RuntimeError, match="odd"):
        attempt_each(videos(2), failing_with(RuntimeError("odd")), together=True)


def test_a_mistake_that_all_processes_see_alike_does_not_end_them():
    both = videos(2)
    attempt_each(both, failing_with(UserError("bad image")), together=True)
    assert both[0].failure == "bad image" and both[1].failure is None
