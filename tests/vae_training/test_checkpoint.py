"""Checkpoints of VAE training are complete or missing, also on full disks, and pruned."""

import errno
from types import SimpleNamespace

import pytest
import torch

from cogvideox_sat.files import sizes
from cogvideox_sat.vae_training import checkpoint
from cogvideox_sat.vae_training.checkpoint import publish, saved_bytes, write_whole
from sgm.errors import UserError

CONTENT = {"state_dict": {"weight": torch.ones(1000)}, "steps": [torch.ones(10, dtype=torch.float64)]}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "checkpoints" / "step=2.ckpt"
    write_whole({"earlier": 1}, path)
    return path


def test_a_tensor_counts_once_however_often_it_is_in():
    assert saved_bytes(CONTENT) == 4080
    tied = torch.ones(100)
    assert saved_bytes({"a": tied, "b": [tied, tied[:50]], "c": {"d": (tied.view(10, 10),)}}) == 400
    assert saved_bytes({"a": 1, "b": "text"}) == 0


def test_room_is_looked_for_before_anything_is_written(file, monkeypatch):
    monkeypatch.setattr(sizes.shutil, "disk_usage", lambda _: SimpleNamespace(free=4079))
    with pytest.raises(UserError, match=r"cannot write .*step=2\.ckpt: the disk is full"):
        write_whole(CONTENT, file)
    assert torch.load(file) == {"earlier": 1}
    monkeypatch.setattr(sizes.shutil, "disk_usage", lambda _: SimpleNamespace(free=4080))
    write_whole(CONTENT, file)
    assert torch.equal(torch.load(file)["state_dict"]["weight"], torch.ones(1000))


def test_a_disk_that_fills_up_leaves_the_file_of_before(file, monkeypatch):
    def fail(_, part):
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", fail)
        with pytest.raises(UserError, match=r"the disk is full: .* are needed, .* the previous checkpoint is kept"):
            write_whole(CONTENT, file)
    assert torch.load(file) == {"earlier": 1}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_a_killed_process_left_makes_room(file):
    (file.parent / ".step=4.ckpt.77.part").write_bytes(b"half")
    write_whole(CONTENT, file.with_name("step=4.ckpt"))
    assert {path.name for path in file.parent.iterdir()} == {"step=2.ckpt", "step=4.ckpt"}


def test_outdated_checkpoints_go_once_the_new_one_is_named(file, tmp_path):
    for step in (4, 6, 8):
        write_whole(CONTENT, file.with_name(f"step={step}.ckpt"))
    (file.parent / "mine.ckpt").touch()
    publish(file.with_name("step=6.ckpt"), tmp_path, keep_last=2)  # resumed from 4: 8 is another future
    assert {path.name for path in file.parent.iterdir()} == {"step=4.ckpt", "step=6.ckpt", "mine.ckpt"}
    assert (tmp_path / "latest").read_text() == "step=6.ckpt"
