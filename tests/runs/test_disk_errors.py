"""Errors when a checkpoint cannot be written."""

import errno
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from cogvideox_sat.files import sizes
from cogvideox_sat.runs.disk_errors import cannot_write, check_room_for_checkpoint
from sgm.errors import UserError

GIB = 2**30


@pytest.fixture(autouse=True)
def half_a_gib(monkeypatch):
    monkeypatch.setattr(sizes.shutil, "disk_usage", lambda _: SimpleNamespace(free=GIB // 2))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0: write failed"),
    ],
)
def test_a_full_disk_in_the_words_of_every_library(tmp_path, error):
    line = str(cannot_write(tmp_path / "10", error, GIB))
    assert "the disk is full: 1.00 GiB are needed, 0.50 GiB are free; the previous checkpoint is kept" in line
    assert "--resume latest" in line
    assert "the disk is full: 0.50 GiB are free" in str(cannot_write(tmp_path / "10", error))


def test_other_reasons_are_told(tmp_path):
    line = str(cannot_write(tmp_path / "10", OSError(errno.EIO, "Input/output\nerror")))
    assert line.startswith(f"cannot write {tmp_path}/10: ") and "Input/output error" in line and "\n" not in line
    told = UserError("as it is")
    assert cannot_write(tmp_path, told) is told


def test_room_is_checked_before(tmp_path):
    check_room_for_checkpoint(tmp_path / "10", GIB // 2)
    with pytest.raises(UserError, match=r"the disk is full: 0\.60 GiB are needed, 0\.50 GiB are free"):
        check_room_for_checkpoint(tmp_path / "10", int(0.6 * GIB))


def test_a_folder_that_was_removed_during_the_run_is_told_as_any_other_failure(tmp_path, monkeypatch):
    monkeypatch.undo()  # the disk's own numbers, which a folder that is gone does not have
    path = tmp_path / "gone" / "1"
    assert "GiB are free" in str(cannot_write(path, OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match="the disk is full"):
        check_room_for_checkpoint(path, 2**62)
