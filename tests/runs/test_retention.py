"""The checkpoints that are kept."""

import pytest

from cogvideox_sat.runs.retention import last_saved, mark_newest, outdated, remove_unfinished


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
