"""Test that a part of a file behaves as a file."""

import io

import pytest

from cogvideox_sat.files.file_part import FilePart

CONTENT = bytes(range(200))


@pytest.fixture
def part(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 30 + CONTENT + b"y" * 30)
    with FilePart(tmp_path / "a", 30, len(CONTENT)) as opened:
        yield opened


def test_reading_stays_within_the_part(part):
    assert part.read() == CONTENT
    assert part.read(5) == b""
    assert part.seek(-10, io.SEEK_END) == 190
    assert part.read(100) == CONTENT[190:]
    assert part.seek(50) == part.tell() == 50
    assert part.read(4) == CONTENT[50:54]
    assert part.seek(-4, io.SEEK_CUR) == 50
    part.seek(500)
    assert part.read(4) == b""


def test_it_may_be_buffered(part):
    buffered = io.BufferedReader(part)
    assert buffered.read(7) == CONTENT[:7]
    buffered.seek(100)
    assert buffered.read() == CONTENT[100:]


def test_a_file_that_is_missing_or_too_short_is_told(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 30)
    with pytest.raises(OSError, match="it ends after 10 of 100 bytes"):
        FilePart(tmp_path / "a", 20, 100)
    with pytest.raises(OSError, match="it ends after 0 of 5 bytes"):
        FilePart(tmp_path / "a", 40, 5)
    with pytest.raises(FileNotFoundError):
        FilePart(tmp_path / "b", 0, 1)
