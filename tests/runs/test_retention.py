"""The checkpoints that are kept."""

import errno
from pathlib import Path

import pytest

from cogvideox_sat.runs.retention import last_saved, mark_newest, outdated, remove_unfinished
from sgm.errors import UserError


@pytest.mark.parametrize(
    ("steps", "newest", "keep_last", "deleted"),
    [
        ([10, 20, 30], 30, None, []),
        ([10, 20, 30], 30, 1, [10, 20]),
        ([30, 10, 20], 30, 2, [10]),
        ([10, 20], 20, 5, []),
        ([10, 20, 30, 40], 20, 2, [30, 40]),  # resumed from 10: what came after is another future
        ([10, 20, 30, 40], 20, None, []),
        ([], 10, 1, []),
        ([10, 20], 20, 0, [10, 20]),
    ],
)
def test_outdated(steps, newest, keep_last, deleted):
    assert outdated(steps, newest, keep_last) == deleted
    assert outdated(iter(steps), newest, keep_last) == deleted


def test_the_newest_is_named(tmp_path):
    assert last_saved(tmp_path) is None
    mark_newest(tmp_path, "10")
    mark_newest(tmp_path, "step=20.ckpt")
    assert (tmp_path / "latest").read_text() == "step=20.ckpt"
    assert last_saved(tmp_path) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".10.part").mkdir()
    (tmp_path / ".10.part" / "weights").touch()
    (tmp_path / ".step=5.ckpt.77.part").touch()
    for kept in ("10", "latest", ".hidden", "mine.part"):
        (tmp_path / kept).touch()
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"10", "latest", ".hidden", "mine.part"}


def test_a_full_disk_is_one_line_and_keeps_the_name(tmp_path, monkeypatch):
    mark_newest(tmp_path, "10")

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot write .*latest: No space left on device; make room"):
        mark_newest(tmp_path, "20")
    assert (tmp_path / "latest").read_text() == "10"
