"""Test that loaders give the same batches with any number of workers.

Dead workers are reported.
"""

import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import processes
import stuck_clips
from cogvideox_sat.clips.batch_order import BatchOrder, SampleKey
from cogvideox_sat.clips.loader import ClipLoader, collate
from cogvideox_sat.clips.probing import INDEX
from cogvideox_sat.clips.reading_processes import ReadingProcesses
from cogvideox_sat.clips.timeouts import ClipTimeouts, TimedOutClip
from cogvideox_sat.latent_geometry import Bucket
from data_video import SFTDataset
from sgm.errors import UserError
from training_clips import clip_number, write_dataset

SIZES = [[64, 96], [96, 64]]
LIMIT = 2.5  # seconds for a clip; reading one takes milliseconds, but the machine may be busy
SETTINGS = {"video_size": [64, 96], "fps": 8, "max_num_frames": 9, "skip_frms_num": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write eight clips of 17 frames, the even ones landscape, the odd ones portrait."""
    return write_dataset(tmp_path_factory.mktemp("data") / "set", clips=8, sizes=[(64, 96), (96, 64)])


def order_of(dataset: Dataset, micro_batch_size: int = 1) -> BatchOrder:
    buckets = [dataset.bucket(index) for index in range(len(dataset))]
    return BatchOrder(buckets, micro_batch_size, 0, 1, seed=0)


def test_collate_stacks_tensors_and_lists_the_rest():
    batch = collate([{"x": torch.ones(2), "txt": "a", "seed": 1}, {"x": torch.zeros(2), "txt": "b", "seed": 2}])
    assert torch.equal(batch.pop("x"), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert batch == {"txt": ["a", "b"], "seed": [1, 2]}


@pytest.mark.slow
def test_workers_change_nothing(folder):
    dataset = SFTDataset(folder, **{**SETTINGS, "video_size": SIZES})
    random_state = torch.random.get_rng_state()
    loaded = [list(itertools.islice(ClipLoader(dataset, order_of(dataset, 2), workers), 9)) for workers in (0, 2)]
    assert torch.equal(torch.random.get_rng_state(), random_state)
    for one, other in zip(*loaded, strict=True):
        assert torch.equal(one.pop("mp4"), other.pop("mp4"))
        assert one == other
    assert len({batch["index"][0] for batch in loaded[0]}) > 4


def test_a_loader_may_be_gone_through_again(folder):
    dataset = SFTDataset(folder, **SETTINGS)
    loader = ClipLoader(dataset, [[SampleKey(0, 1), SampleKey(1, 2)], [SampleKey(7, 3)]], 2)
    passes = [[batch["index"] for batch in loader] for _ in range(2)]
    assert passes == [[[0, 1], [7]]] * 2


class Failing(Dataset):
    """Dataset that fails for the second sample in a chosen way."""

    def __init__(self, failure: str):
        self.failure = failure

    def __getitem__(self, key: SampleKey) -> dict:
        if key.index == 1:
            if self.failure == "error":
                raise UserError("clips/a.mp4 cannot be read any more")
            if self.failure == "bug":
                raise KeyError("a mistake in the program")
            os.kill(os.getpid(), signal.SIGKILL)
        return {"pid": os.getpid(), "group": os.getpgid(0)}


def failure(kind: str, workers: int) -> str:
    """Return the message of a failure to load two batches, the second of which is unreadable."""
    try:
        list(ClipLoader(Failing(kind), [[SampleKey(0, 0)], [SampleKey(1, 0)]], workers))
    except Exception as error:  # not pytest.raises, whose traceback would keep the workers alive
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_the_users_one_line(workers):
    assert failure("error", workers) == "UserError: clips/a.mp4 cannot be read any more"


def test_a_mistake_in_the_program_keeps_its_traceback():
    message = failure("bug", 1)
    assert message.startswith("KeyError: ")
    assert "line " in message


def test_a_worker_that_is_killed_is_reported_on_one_line():
    message = failure("kill", 1)
    assert message.startswith("UserError: a process that reads data died (pid ")
    assert "signal SIGKILL" in message
    assert message.endswith("lower num_workers")
    assert "\n" not in message


def test_a_signal_to_the_process_group_spares_the_workers():
    (batch,) = ClipLoader(Failing("none"), [[SampleKey(0, 0)]], 1)
    assert batch["pid"] != [os.getpid()]
    assert batch["group"] == batch["pid"]


@pytest.mark.slow
def test_workers_end_with_the_trainer(folder):
    """Workers also end if the trainer, with its own signal handlers, leaves the loop early."""
    program = f"""
import os, signal, sys
from pathlib import Path
from cogvideox_sat.clips.batch_order import SampleKey
from cogvideox_sat.clips.probing import INDEX
from cogvideox_sat.clips.reading_processes import ReadingProcesses
from cogvideox_sat.clips.timeouts import ClipTimeouts, TimedOutClip
from cogvideox_sat.clips.loader import ClipLoader
from data_video import SFTDataset
signal.signal(signal.SIGTERM, lambda *_: None)
dataset = SFTDataset({str(folder)!r}, [64, 96], 8, 9)
batches = iter(ClipLoader(dataset, [[SampleKey(i % 8, 0)] for i in range(100)], 2))
next(batches)
print(Path(f"/proc/self/task/{{os.getpid()}}/children").read_text(), flush=True)
raise SystemExit(3)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 3, done.stderr
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


# ---------------------------------------------------------------- clips that take too long


@pytest.fixture
def stuck(tmp_path, monkeypatch) -> Path:
    """Return a folder of marks for `stuck_clips.patch`, which is in effect."""
    import data_video
    from cogvideox_sat.clips import probing as clip_probing

    for module, name in ((data_video, "read_clip"), (clip_probing, "probe")):
        monkeypatch.setattr(module, name, getattr(module, name))  # so that it is restored
    folder = tmp_path / "stuck"
    folder.mkdir()
    stuck_clips.patch(folder)
    return folder


def shown(batch: dict) -> list[int]:
    return [clip_number(clip) for clip in batch["mp4"]]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_clip_that_never_returns_is_replaced_like_an_unreadable_one(folder, stuck, workers, caplog):
    dataset = SFTDataset(folder, **SETTINGS)
    (stuck / "002.mp4").touch()
    order = [[SampleKey(0, 5), SampleKey(1, 5)], [SampleKey(2, 7), SampleKey(4, 7)], [SampleKey(5, 7), SampleKey(1, 3)]]
    timeouts = ClipTimeouts("train_data")
    began = time.monotonic()
    batches = list(ClipLoader(dataset, order, workers, clip_timeout=LIMIT, timeouts=timeouts))
    assert time.monotonic() - began < 60
    assert [shown(batch) for batch in batches] == [[0, 1], [3, 4], [5, 1]]
    assert torch.equal(batches[1]["mp4"][0], dataset[SampleKey(3, 7)]["mp4"])
    name = str(folder / "videos" / "002.mp4")
    reason = f"not read within {LIMIT:g} s (clip_timeout)"
    assert batches[1]["unreadable"] == [[f"{name}: {reason}"], []]
    assert [batch["index"] for batch in batches] == [[0, 1], [2, 4], [5, 1]]
    (entry,) = timeouts.take_news()
    substitute = str(folder / "videos" / "003.mp4")
    assert entry == TimedOutClip("train_data", 2, 0, 2, name, reason, substitute)
    assert caplog.text.count(f"{name}: {reason}") == 1


@pytest.mark.slow
def test_later_samples_do_without_a_clip_that_took_too_long(folder, stuck):
    """Samples that were read ahead also replace the clip; samples of earlier steps keep it."""
    dataset = SFTDataset(folder, **SETTINGS)
    name = str(folder / "videos" / "002.mp4")
    order = [[SampleKey(index, 0)] for index in (2, 1, 2, 2)]
    timeouts = ClipTimeouts("train_data")
    batches = iter(ClipLoader(dataset, order, 2, timeouts=timeouts))
    assert shown(next(batches)) == [2]
    time.sleep(2)  # the third is ready by now
    timeouts.learn([TimedOutClip("train_data", 2, 0, 99, name, "too slow", None)])
    assert [shown(batch) for batch in batches] == [[1], [3], [3]]
    (stuck / "002.mp4").touch()
    known = [TimedOutClip("train_data", 1, 0, 2, name, "too slow", None)]
    loader = ClipLoader(dataset, order[:1], 0, clip_timeout=60, timeouts=ClipTimeouts("train_data", known=known))
    assert [shown(batch) for batch in loader] == [[3]]


@pytest.mark.slow
def test_processes_that_read_the_same_sample_agree_about_it(folder):
    """Another process could not read the clip in time, so this one reads the substitute too."""
    dataset = SFTDataset(folder, **SETTINGS)
    name = str(folder / "videos" / "002.mp4")
    told = [[TimedOutClip("train_data", 1, 0, 2, name, "too slow", None)], [], []]
    asked = []

    def share(news: list[TimedOutClip], what: str) -> list[TimedOutClip]:
        asked.append(what)
        return told[len(asked) - 1]

    loader = ClipLoader(dataset, [[SampleKey(2, 0)], [SampleKey(1, 0)]], 1, share=share)
    assert [shown(batch) for batch in loader] == [[3], [1]]
    assert asked == [f"the clips of step {step} (train_data)" for step in (1, 1, 2)]


def test_a_decoder_that_crashes_costs_one_clip(folder, stuck):
    dataset = SFTDataset(folder, **SETTINGS)
    (stuck / "crash-002.mp4").touch()
    (batch,) = ClipLoader(dataset, [[SampleKey(1, 0), SampleKey(2, 0)]], 1)
    assert shown(batch) == [1, 3]
    assert batch["unreadable"][1][0].endswith("002.mp4: the process that read it crashed (SIGSEGV)")


@pytest.mark.slow
def test_looking_at_clips_is_limited_in_time(folder, stuck, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "set", ignore=shutil.ignore_patterns(INDEX))
    for name in ("probe-001.mp4", "probe-007.mp4"):
        (stuck / name).touch()
    dataset = SFTDataset(copied, **SETTINGS, max_unreadable_share=0.5, clip_timeout=LIMIT)
    assert [Path(source.name).stem for source in dataset.sources] == ["000", "002", "003", "004", "005", "006"]
    expected = [f"{copied}/videos/{n}.mp4: not read within {LIMIT:g} s (clip_timeout)" for n in ("001", "007")]
    assert dataset.unreadable == expected


class Foreign(Dataset):
    """Dataset that gives no names of clips."""

    def __len__(self) -> int:
        return 3

    def bucket(self, index: int) -> Bucket:
        return Bucket(1, 8, 8)

    def __getitem__(self, key: SampleKey) -> dict:
        if key.index == 1:
            stuck_clips.hang()
        return {"index": key.index, "x": torch.full((2,), float(key.index)), "unreadable": []}


@pytest.mark.slow
def test_of_a_data_set_without_attempts_the_next_sample_stands_in():
    (batch,) = ClipLoader(Foreign(), [[SampleKey(0, 0), SampleKey(1, 0)]], 1, clip_timeout=LIMIT)
    assert batch["x"].tolist() == [[0.0, 0.0], [2.0, 2.0]]
    assert batch["index"] == [0, 1]
    assert batch["unreadable"] == [[], [f"sample 1: not read within {LIMIT:g} s (clip_timeout)"]]


@pytest.mark.slow
def test_processes_that_hang_end_with_the_trainer_that_is_killed(folder):
    """Only SIGKILL ends them, and no process is left to send it."""
    program = f"""
import os, time
from pathlib import Path
import data_video, stuck_clips
from cogvideox_sat.clips.batch_order import SampleKey
from cogvideox_sat.clips.probing import INDEX
from cogvideox_sat.clips.reading_processes import ReadingProcesses
from cogvideox_sat.clips.timeouts import ClipTimeouts, TimedOutClip
from cogvideox_sat.clips.loader import ClipLoader
dataset = data_video.SFTDataset({str(folder)!r}, [64, 96], 8, 9)
data_video.read_clip = lambda *_, **__: stuck_clips.hang()
batches = iter(ClipLoader(dataset, [[SampleKey(i % 8, 0)] for i in range(100)], 2))
time.sleep(1)
print(Path(f"/proc/self/task/{{os.getpid()}}/children").read_text(), flush=True)
os.kill(os.getpid(), 9)
"""
    done = processes.run(["-c", program], env=stuck_clips.environment(), timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in workers)


def is_alive(pid: int) -> bool:
    """Return whether a process runs; an ended process may still be a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_too_many_open_files_are_named():
    """Each batch that the caller keeps may hold one."""
    readers = ReadingProcesses(lambda _: torch.ones(3), 1, limit=60)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    kept: list[Any] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 10, limits[1]))
    try:
        for number in range(30):
            readers.submit(number, None)
        with pytest.raises(UserError, match=r"Too many open files; raise the limit of open files \(ulimit -n\)$"):
            while len(kept) < 30:
                kept += readers.collect()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        readers.close()
