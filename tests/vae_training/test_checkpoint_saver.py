"""Background checkpoints of VAE training equal the others, or are one error line."""

import threading

import pytest
import torch

from cogvideox_sat.parallel.agreement import join_processes
from cogvideox_sat.runs import staging
from cogvideox_sat.runs.staging import StagingMemory
from cogvideox_sat.vae_training import checkpoint
from cogvideox_sat.vae_training.checkpoint import WholeFiles
from cogvideox_sat.vae_training.checkpoint_saver import CheckpointSaver
from sgm.errors import UserError


class Training:
    """A trainer and its module in one, as far as saving goes."""

    ema_decay = 0.9

    def __init__(self):
        self.network = torch.nn.Linear(4, 3)
        self.average = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.files = WholeFiles()

    def coder_state_dict(self, ema):
        assert ema
        return self.average

    def save_checkpoint(self, path):
        content = {"state_dict": self.network.state_dict(), "ema": self.average, "run": {"step": 1}}
        self.files.save_checkpoint(content, path)

    def step(self):
        with torch.no_grad():
            for tensor in (*self.network.parameters(), *self.average.values()):
                tensor.add_(1)


@pytest.fixture
def training():
    join_processes()
    torch.manual_seed(0)
    return Training()


@pytest.fixture
def go(monkeypatch):
    """Prevent all writing until the event is set."""
    write, event = torch.save, threading.Event()

    def late(content, path):
        assert event.wait(60)
        write(content, path)

    monkeypatch.setattr(checkpoint.torch, "save", late)
    yield event
    event.set()


def saver(training, folder, keep_last=None, background=True):
    memory = StagingMemory(pinned=False) if background else None
    return CheckpointSaver(folder, keep_last, training.files, memory)


def test_the_bytes_are_those_of_the_moment_of_saving(training, tmp_path, go):
    go.set()
    saver(training, tmp_path / "before", background=False).save(training, training, 1, wait=False)
    go.clear()
    late = saver(training, tmp_path / "behind")
    late.save(training, training, 1, wait=False)
    training.step()
    assert not (tmp_path / "behind" / "latest").exists()
    go.set()
    late.finish()
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in ("before", "behind")]
    assert files[0] == files[1] and files[0].keys() == {"step=1.ckpt", "3d-vae.pt"}
    assert (tmp_path / "behind" / "latest").read_text() == "step=1.ckpt"


def test_one_at_a_time_and_the_ones_before_stay_until_it_is_there(training, tmp_path, go):
    late = saver(training, tmp_path, keep_last=1)
    go.set()
    late.save(training, training, 1, wait=True)
    assert (tmp_path / "latest").read_text() == "step=1.ckpt"
    go.clear()
    late.save(training, training, 2, wait=False)
    assert (tmp_path / "latest").read_text() == "step=1.ckpt"
    threading.Timer(0.2, go.set).start()
    late.save(training, training, 3, wait=True)
    assert (tmp_path / "latest").read_text() == "step=3.ckpt"
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step=3.ckpt"}


def test_an_error_is_one_line_where_the_run_waits(training, tmp_path, monkeypatch):
    late = saver(training, tmp_path)
    late.save(training, training, 1, wait=True)

    def fail(_, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    late.save(training, training, 2, wait=False)
    late.thread._thread.join(60)
    assert late.failed
    with pytest.raises(UserError, match=r"cannot write .*step=2\.ckpt: the disk is full: .* is kept"):
        late.finish()
    assert (tmp_path / "latest").read_text() == "step=1.ckpt"
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step=1.ckpt"}


def test_without_room_in_memory_it_is_written_between_steps(training, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(staging, "free_host_memory", lambda: 10)
    late = saver(training, tmp_path)
    for step in (1, 2):
        late.save(training, training, step, wait=False)
        assert (tmp_path / "latest").read_text() == f"step={step}.ckpt"
    assert caplog.text.count("written between steps") == 1
