"""Loaders give the same batches with any number of workers, and say what became of a worker that ended."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from batch_order import BatchOrder, SampleKey
from clip_loader import collate, make_loader
from data_video import SFTDataset
from sgm.errors import UserError
from training_clips import write_dataset

SIZES = [[64, 96], [96, 64]]
SETTINGS = {"video_size": [64, 96], "fps": 8, "max_num_frames": 9, "skip_frms_num": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight clips of 17 frames: even ones lie, odd ones stand."""
    return write_dataset(tmp_path_factory.mktemp("data") / "set", clips=8, sizes=[(64, 96), (96, 64)])


def order_of(dataset: Dataset, micro_batch_size: int = 1) -> BatchOrder:
    buckets = [dataset.bucket(index) for index in range(len(dataset))]
    return BatchOrder(buckets, micro_batch_size, 0, 1, seed=0)


def test_collate_stacks_tensors_and_lists_the_rest():
    batch = collate([{"x": torch.ones(2), "txt": "a", "seed": 1}, {"x": torch.zeros(2), "txt": "b", "seed": 2}])
    assert torch.equal(batch.pop("x"), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert batch == {"txt": ["a", "b"], "seed": [1, 2]}


def test_workers_change_nothing(folder):
    dataset = SFTDataset(folder, **{**SETTINGS, "video_size": SIZES})
    random_state = torch.random.get_rng_state()
    loaded = [list(itertools.islice(make_loader(dataset, order_of(dataset, 2), workers), 9)) for workers in (0, 2)]
    assert torch.equal(torch.random.get_rng_state(), random_state)
    for one, other in zip(*loaded, strict=True):
        assert torch.equal(one.pop("mp4"), other.pop("mp4"))
        assert one == other
    assert len({batch["index"][0] for batch in loaded[0]}) > 4


def test_a_loader_may_be_gone_through_again(folder):
    dataset = SFTDataset(folder, **SETTINGS)
    loader = make_loader(dataset, [[SampleKey(0, 1), SampleKey(1, 2)], [SampleKey(7, 3)]], 2)
    passes = [[batch["index"] for batch in loader] for _ in range(2)]
    assert passes == [[[0, 1], [7]]] * 2


class Failing(Dataset):
    """Fails for the second sample in a way of choice."""

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
    """How loading two batches fails, the second of which cannot be read."""
    try:
        list(make_loader(Failing(kind), [[SampleKey(0, 0)], [SampleKey(1, 0)]], workers))
    except Exception as error:  # not pytest.raises, whose record of it would keep the workers alive
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
    assert message.startswith("UserError: a process that reads data died (DataLoader worker (pid")
    assert message.endswith("lower num_workers")
    assert "\n" not in message


def test_a_signal_to_the_process_group_spares_the_workers():
    (batch,) = make_loader(Failing("none"), [[SampleKey(0, 0)]], 1)
    assert batch["pid"] != [os.getpid()]
    assert batch["group"] == batch["pid"]


def test_workers_end_with_the_trainer(folder):
    """Also when it leaves the loop in the middle, with signal handlers of its own."""
    program = f"""
import multiprocessing, os, signal, sys
from batch_order import SampleKey
from clip_loader import make_loader
from data_video import SFTDataset
signal.signal(signal.SIGTERM, lambda *_: None)
dataset = SFTDataset({str(folder)!r}, [64, 96], 8, 9)
batches = iter(make_loader(dataset, [[SampleKey(i % 8, 0)] for i in range(100)], 2))
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
raise SystemExit(3)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 3, done.stderr
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
