"""Test numbers of bytes in words, and the free bytes of a disk."""

from types import SimpleNamespace

import pytest

from cogvideox_sat.files import sizes
from cogvideox_sat.files.sizes import GIB, MIB, free_bytes, in_units, in_words, room_in_words


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0.00 MiB"), (MIB // 2, "0.50 MiB"), (100 * MIB, "100.00 MiB"), (GIB // 2, "0.50 GiB")]
)
def test_small_sizes_have_a_small_unit(size, words):
    assert in_words(size) == words


@pytest.mark.parametrize(
    ("size", "words"), [(1010, "1010 bytes"), (1536, "1.5 KiB"), (1023 * MIB, "1023 MiB"), (1.5 * GIB, "1.5 GiB")]
)
def test_sizes_in_their_largest_unit(size, words):
    assert in_units(size) == words


def test_the_disk_of_a_folder_that_is_not_there(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sizes.shutil, "disk_usage", lambda folder: asked.append(folder) or SimpleNamespace(free=GIB))
    assert free_bytes(tmp_path / "a" / "b" / "c") == GIB and asked == [tmp_path]
    assert room_in_words(tmp_path / "a", None) == "1.00 GiB are free"
    assert room_in_words(tmp_path / "a", 2 * MIB) == "2.00 MiB are needed, 1.00 GiB are free"
