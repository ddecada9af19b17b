"""What becomes of a failure: it ends its own video, or, where processes share a network, the process."""

from types import SimpleNamespace

import pytest
import torch

from cogvideox_sat.sampling import run as sampling_run
from cogvideox_sat.sampling.run import Job, attempt_each
from sgm.errors import UserError


def jobs(count: int) -> list[Job]:
    return [Job(SimpleNamespace(request=SimpleNamespace(index=i, text=f"prompt {i}"))) for i in range(count)]


def failing_with(error: Exception, index: int = 0):
    def stage(job: Job) -> None:
        if job.video.request.index == index:
            raise error
        job.latents = torch.ones(1)

    return stage


def share_networks_among(monkeypatch, processes: int) -> None:
    monkeypatch.setattr(sampling_run.mpu, "get_model_parallel_world_size", lambda: processes)


@pytest.mark.parametrize(
    ("error", "with_traceback"),
    [(UserError("bad image"), False), (RuntimeError("odd"), True), (torch.OutOfMemoryError("full"), False)],
)
def test_a_failure_ends_its_own_video(error, with_traceback, monkeypatch, caplog):
    share_networks_among(monkeypatch, 1)
    both = jobs(2)
    attempt_each(both, failing_with(error))
    assert both[0].failure and both[1].failure is None and both[1].latents is not None
    assert "failed: prompt 1 ('prompt 0')" in caplog.text
    assert bool(caplog.records[0].exc_info) == with_traceback


def test_a_process_that_fails_inside_a_shared_network_ends(monkeypatch):
    """Going on, its next all-reduce would meet the present one of its partners, and wrong videos would be written."""
    share_networks_among(monkeypatch, 2)
    with pytest.raises(RuntimeError, match="odd"):
        attempt_each(jobs(2), failing_with(RuntimeError("odd")))


def test_a_mistake_that_all_processes_see_alike_does_not_end_them(monkeypatch):
    share_networks_among(monkeypatch, 2)
    both = jobs(2)
    attempt_each(both, failing_with(UserError("bad image")))
    assert both[0].failure == "bad image" and both[1].failure is None
