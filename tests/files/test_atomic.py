"""Test that files and folders are written atomically, and errors are one line."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cogvideox_sat.files import atomic, sizes
from cogvideox_sat.files.atomic import new_file, new_folder, replaced_when_complete, write_atomically, write_safetensors
from sgm.errors import UserError


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.fixture
def full_disk(monkeypatch):
    monkeypatch.setattr(sizes.shutil, "disk_usage", lambda _: SimpleNamespace(free=atomic.SPARE_BYTES))


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "file"
    with replaced_when_complete(path) as part:
        part.write_text("one")
        assert not path.exists()
    with replaced_when_complete(path) as part:
        part.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two" and names(path.parent) == ["file"]


def test_a_file_stays_as_it_was_after_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_text("one")
    with pytest.raises(ZeroDivisionError), replaced_when_complete(path) as part:
        part.write_text("two")
        raise ZeroDivisionError
    assert path.read_text() == "one" and names(tmp_path) == ["file"]


def test_a_folder_takes_the_place_of_another(tmp_path):
    folder = tmp_path / "folder"
    for text in ("one", "two"):
        with new_folder(folder, needed=3) as part:
            (part / text).write_text(text)
    assert names(folder) == ["two"] and names(tmp_path) == ["folder"]


def test_a_folder_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    """Otherwise a power failure could delete the old folder and leave empty files."""
    events, rename, fsync = [], Path.rename, os.fsync

    def note_sync(handle):
        events.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    def note_rename(path, target):
        events.append(f"{path.name} to {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    with new_folder(tmp_path / "folder", needed=0) as part:
        (part / "within").mkdir()
        (part / "within" / "file").write_text("content")
    assert sorted(events[:3]) == ["file", "new", "within"] and events[3:] == ["new to folder"]


@pytest.mark.parametrize("exists", [False, True])
def test_the_folder_of_a_symbolic_link_is_written(tmp_path, exists):
    """A link to another disk stays, also one whose folder does not exist yet."""
    there, link = tmp_path / "disk" / "there", tmp_path / "link"
    link.symlink_to(there)
    if exists:
        there.mkdir(parents=True)
        (there / "old").touch()
    with new_folder(link, needed=0) as part:
        (part / "new").touch()
    assert link.is_symlink() and names(there) == names(link) == ["new"] and names(tmp_path / "disk") == ["there"]


@pytest.mark.parametrize("make", [new_folder, new_file])
def test_nothing_is_left_after_an_error_in_folders_that_were_made(tmp_path, make):
    with pytest.raises(ZeroDivisionError), make(tmp_path / "a" / "b", needed=0):
        raise ZeroDivisionError
    assert names(tmp_path) == []


@pytest.mark.parametrize("make", [new_folder, new_file])
def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, full_disk, make):
    with pytest.raises(UserError, match="make room"), make(tmp_path / "a" / "b", needed=1):
        pytest.fail("it was written")
    assert names(tmp_path) == []


def test_what_the_system_refuses_names_the_path(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"cannot write .*file/below: "),
        replaced_when_complete(tmp_path / "file/below"),
    ):
        pytest.fail("it was written")


def test_others_may_read_weights_as_far_as_the_umask_says(tmp_path):
    path = tmp_path / "weights.safetensors"
    weights = {"a": torch.arange(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    write_safetensors(path, weights)
    loaded = load_file(path)
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_content_in_memory_is_written_whole(tmp_path):
    path = tmp_path / "deep" / "file"
    write_atomically(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    write_atomically(path, b"\xff")
    assert path.read_bytes() == b"\xff" and names(path.parent) == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_disk_that_takes_nothing_more_keeps_the_file(tmp_path, monkeypatch, number):
    path = tmp_path / "file"
    path.write_text("one")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UserError, match=f"^cannot write {path}: {os.strerror(number)}"):
        write_atomically(path, "two")
    assert path.read_text() == "one" and names(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    with new_folder(folder, needed=0) as part:
        (part / "one").touch()
    rename = Path.rename

    def refuse_new(path, target):
        if path.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(UserError, match=r"cannot write .*folder: Input/output error"), new_folder(folder, 0) as part:
        (part / "two").touch()
    assert names(folder) == ["one"] and names(tmp_path) == ["folder"]
