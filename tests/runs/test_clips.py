"""Runs continue without clips that hang, on any number of processes and after a resume."""

import shutil
from pathlib import Path

import pytest

import stuck_clips
import vae_runs
from cogvideox_sat.clips.timeouts import read_record
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.runs.clips import describe_data
from long_cases import others_long
from training_clips import write_dataset
from training_runs import metrics, runs_of, write_config

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SECONDS = "12"  # for a clip; reading one takes milliseconds, but a process that reads may be slow to start
REASON = f"not read within {SECONDS} s (clip_timeout)"


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("clips") / "data", clips=8, frames=12, sizes=[(64, 96)])


@pytest.fixture
def stuck(tmp_path) -> Path:
    folder = tmp_path / "stuck"
    folder.mkdir()
    return folder


def test_a_run_says_what_it_trains_on():
    class Clips:
        def __len__(self) -> int:
            return 3

        def bucket(self, index: int) -> Bucket:
            return Bucket(9, 64, 96)

    assert describe_data(Clips(), 6) == f"3 clips, 2.0 passes over them: 3 of {Bucket(9, 64, 96)}"


def unreadable(run: Path) -> set[str]:
    """Return the lines of all lists of unreadable clips of a run."""
    return {line for file in run.glob("unreadable-*.txt") for line in file.read_text().splitlines()}


def resumed(run: Path, step: str, folder: Path) -> Path:
    """Copy a run as it was when killed after `step`, with the lines written by then."""
    copy = shutil.copytree(run, folder / run.name)
    (copy / "latest").write_text(step)
    return copy


@pytest.mark.parametrize(("workers", "others", "processes"), others_long((2, 1, 2), (0, 2, 1)))
def test_training_goes_on_and_resumes_to_the_bit(tmp_path, tiny, clips, stuck, workers, others, processes):
    """One clip hangs in reading, one in probing; after the resume both could be read."""
    for name in ("003.mp4", "probe-006.mp4"):
        (stuck / name).touch()
    settings = {"train_iters": 6, "save_interval": 2, "micro_batch": 1 if processes > 1 else 2}
    config = write_config(
        tmp_path / "config.yaml", tiny, "5b", clips, **settings, clip_timeout=float(SECONDS), max_unreadable_share=0.5
    )
    command = ["train_video", "--base", str(config), "--num_workers"]
    output = stuck_clips.run(stuck, *command, str(workers), ranks=processes)
    (run,) = runs_of(config)
    expected = metrics(run)
    assert list(expected) == [1, 2, 3, 4, 5, 6]
    slow, unseen = (f"{clips}/videos/{name}" for name in ("003.mp4", "006.mp4"))
    assert unreadable(run) == {f"{slow}: {REASON}", f"{unseen}: {REASON}"}
    if processes == 1:  # only the first process logs, and another one may have read the clip
        assert f"{slow}: {REASON}" in output
    record = read_record(run)
    assert {(entry.clip, entry.reason) for entry in record} == {(slow, REASON), (unseen, REASON)}
    (first,) = [entry for entry in record if entry.clip == unseen]
    assert (first.step, first.substitute) == (0, None)
    read = [entry for entry in record if entry.clip == slow]
    assert all(entry.substitute == f"{clips}/videos/004.mp4" and entry.step >= 1 for entry in read)

    for marker in stuck.glob("*.mp4"):
        marker.unlink()
    copy = resumed(run, "2", tmp_path / "copy")
    stuck_clips.run(stuck, *command, str(others), "--resume", str(copy), ranks=processes)
    assert metrics(copy) == expected


@pytest.mark.long
def test_precomputing_lists_it_as_unreadable(tmp_path, tiny, clips, stuck):
    """The caches of two processes, and of one that has no workers of its own, are the same."""
    from cogvideox_sat.clips.latent_dataset import LatentDataset

    (stuck / "003.mp4").touch()
    config = write_config(
        tmp_path / "config.yaml", tiny, "2b", clips, clip_timeout=float(SECONDS), max_unreadable_share=0.5
    )
    for name, processes, workers in (("two", 2, "2"), ("one", 1, "0")):
        arguments = ["--base", str(config), "--output", str(tmp_path / name), "--num_workers", workers]
        stuck_clips.run(stuck, "tools.precompute_latents", *arguments, ranks=processes)
        assert (tmp_path / name / "unreadable.txt").read_text() == f"{clips}/videos/003.mp4: {REASON}\n"
        encoded = LatentDataset([tmp_path / name])
        assert [sample.index for _, sample in encoded.samples] == [0, 1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize(("workers", "others", "processes"), [(0, 2, 2), (2, 0, 1)])
@pytest.mark.long
def test_a_vae_goes_on_and_lists_it(tmp_path, stuck, workers, others, processes):
    data = write_dataset(tmp_path / "data", clips=6, frames=9, sizes=[(32, 32)])
    (stuck / "003.mp4").touch()
    batch = {"batch_size": 2 // processes, "clip_timeout": float(SECONDS), "max_unreadable_share": 0.5}
    config = vae_runs.write_config(tmp_path / "config.yaml", data, args={"train_iters": 6, "save_interval": 2, **batch})
    command = ["train_vae", "--base", str(config), "--num_workers"]
    stuck_clips.run(stuck, *command, str(workers), ranks=processes)
    (run,) = runs_of(config)
    assert unreadable(run) == {f"{data}/videos/003.mp4: {REASON}"}
    assert metrics(run, "unreadable_clips")[6] >= 1
    expected = metrics(run)

    (stuck / "003.mp4").unlink()
    copy = resumed(run, "step=2.ckpt", tmp_path / "copy")
    stuck_clips.run(stuck, *command, str(others), "--resume", str(copy), ranks=processes)
    assert metrics(copy) == expected
