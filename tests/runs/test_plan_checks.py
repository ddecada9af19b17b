"""Checks in both trainers' plans."""

import logging
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest

from cogvideox_sat.configuration.shared_arguments import RunArguments
from cogvideox_sat.runs.folders import claim
from cogvideox_sat.runs.plan_checks import check_places, clip_sizes, plan_resume
from sgm.errors import UserError

LOG = logging.getLogger(__name__)


def test_places_of_data(tmp_path):
    with pytest.raises(UserError, match="train_data: missing; name a folder"):
        check_places(RunArguments(train_data=[""]), "a folder")
    here = str(tmp_path)
    check_places(RunArguments(train_data=[here, "hf://repo", "shards-{00..09}.tar"], valid_data=[here]), "a folder")
    for name in ("train_data", "valid_data"):
        values = {"train_data": [here], name: [here, str(tmp_path / "gone")]}
        with pytest.raises(UserError, match=f"^{name}: .*gone"):
            check_places(RunArguments(**values), "a folder")


@pytest.mark.parametrize(
    ("params", "sizes"),
    [
        ({}, []),
        ({"video_size": [64, 96]}, [[64, 96]]),
        ({"image_size": [64, 96]}, [[64, 96]]),
        ({"video_size": [[64, 96], [96, 64]]}, [[64, 96], [96, 64]]),
    ],
)
def test_sizes(params, sizes):
    assert list(clip_sizes(params)) == sizes


@pytest.mark.parametrize("size", [[], 480, "big", [480], [480, "720"], [480, 0], [[480, 720], [480]], [480.0, 720]])
def test_what_is_no_size(size):
    with pytest.raises(UserError, match=r"data\.params\.video_size: got .*expected \[height, width\] in pixels"):
        list(clip_sizes({"video_size": size}))


def planned(tmp_path: Path, step: int | None, **values):
    args = RunArguments(save=str(tmp_path), experiment_name="a", train_iters=20, **values)
    return plan_resume(args, lambda path: path / "found", lambda _: step, lambda found: found.parent, LOG)


def test_what_a_run_goes_on_from(tmp_path):
    assert planned(tmp_path, 10) == (None, False)
    assert planned(tmp_path, 10, resume="run") == (Path("run/found"), False)
    assert planned(tmp_path, None, resume="run") == (Path("run/found"), False)
    with pytest.raises(UserError, match=r"resume: run/found is at step 20 of 20; raise train_iters"):
        planned(tmp_path, 20, resume="run")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_run_in_which_another_process_trains_is_refused_by_the_first_process(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    run = tmp_path / "run"
    run.mkdir()
    assert planned(tmp_path, 10, resume=str(run)) == (run / "found", False)
    assert not list(run.iterdir()), "planning writes nothing"
    read, write = os.pipe()
    other = os.fork()
    if other == 0:
        kept = claim(run)  # the lock ends with the file
        os.write(write, b"claimed" if kept else b"refused")
        signal.pause()
    assert os.read(read, 7) == b"claimed"
    with nullcontext() if rank == "1" else pytest.raises(UserError, match="another process already continues"):
        planned(tmp_path, 10, resume=str(run))
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    assert planned(tmp_path, 10, resume=str(run)) == (run / "found", False)


def test_a_complete_run_that_latest_means_is_no_mistake(tmp_path):
    run = tmp_path / "a-01-02-03-04"
    run.mkdir()
    (run / "latest").touch()
    assert planned(tmp_path, 19, resume="latest") == (run / "found", False)
    assert planned(tmp_path, 20, resume="latest") == (run / "found", True)


def test_another_value_of_deterministic_is_told(tmp_path, caplog):
    (tmp_path / "training_config.yaml").write_text("args: {deterministic: true}\n")
    planned(tmp_path, 10, resume=str(tmp_path))
    assert "was trained with --deterministic and is resumed with --no-deterministic" in caplog.text
