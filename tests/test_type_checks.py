"""The check of types sees a mistake in a room that is checked, and an entry that is no longer true."""

from pathlib import Path

import pytest

from architecture import LAYERS
from type_checks import NOT_YET, complaints, errors, room_of

CLIPS = "sat/cogvideox_sat/clips/files.py:3: error: Incompatible return value type  [return-value]"


@pytest.mark.parametrize(
    ("line", "room"),
    [
        (CLIPS, "clips"),
        ("sat/cogvideox_sat/engine_choice.py:1: error: x", "engine_choice"),
        ("sat/train_video.py:1: error: x", "train_video"),
        ("sgm/modules/ema.py:1: error: x", "sgm"),
    ],
)
def test_rooms_of_files(line, room):
    assert room_of(line) == room


def test_rooms_that_are_not_checked_are_rooms():
    assert {*NOT_YET} < {room for layer in LAYERS for room in layer}


def test_errors_count_where_the_room_is_checked():
    assert complaints([CLIPS], {}) == [CLIPS]
    assert complaints([CLIPS], {"clips": 2}) == []
    (line,) = complaints([CLIPS], {"clips": 2, "media": 1})
    assert line == "media: no errors, or no such room; take it out of NOT_YET"


def test_where_mypy_does_not_run_nothing_passes_for_checked(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho 'No module named mypy' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(RuntimeError, match="No module named mypy"):
        errors(tmp_path)


@pytest.mark.slow
def test_mypy_sees_a_mistake(tmp_path: Path):
    package = tmp_path / "sat" / "cogvideox_sat" / "clips"
    package.mkdir(parents=True)
    (package / "files.py").write_text("def f(x: int) -> str:\n    return x\n")
    (line,) = errors(tmp_path)
    assert room_of(line) == "clips" and "return-value" in line
    (package / "files.py").write_text("def f(x: int) -> int:\n    return x\n")
    assert errors(tmp_path) == []
