"""Test that hashes of content are correct, forgotten after a change, and can be stopped."""

import hashlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from cogvideox_sat.files import content_hashes
from cogvideox_sat.files.content_hashes import BackgroundHashes, Stopped, content_hash, memory_file


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """Return the list of files that are really read."""
    read, hash_of_file = [], content_hashes.hash_of_file

    def noted(path, stop=None):
        read.append(path)
        return hash_of_file(path, stop)

    monkeypatch.setattr(content_hashes, "hash_of_file", noted)
    return read


def write(path: Path, content: bytes, age: float = 100.0) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (time.time() - age,) * 2)
    return path


def settle(monkeypatch) -> None:
    """Let files count as settled at once, since their time of change cannot be set."""
    monkeypatch.setattr(content_hashes, "SETTLED_SECONDS", -1.0)


def test_a_file_has_the_hash_that_sha256sum_prints(tmp_path):
    file = write(tmp_path / "a.bin", b"x" * 100)
    assert content_hash([file]) == "sha256:" + hashlib.sha256(b"x" * 100).hexdigest()


def test_the_hash_of_several_files_is_of_content_and_names(tmp_path):
    def folder(name: str, **files: bytes) -> list[Path]:
        return [write(tmp_path / name / file, content) for file, content in files.items()]

    expected = content_hash(folder("a", one=b"1", two=b"2"))
    assert content_hash(reversed(folder("b", one=b"1", two=b"2"))) == expected, "another folder, another order"
    assert content_hash(folder("c", one=b"2", two=b"1")) != expected
    assert content_hash(folder("d", one=b"1", three=b"2")) != expected


def test_a_file_is_read_once(tmp_path, reads, monkeypatch):
    settle(monkeypatch)
    file = write(tmp_path / "a.bin", b"1")
    assert content_hash([file]) == content_hash([file]) and len(reads) == 1
    file.rename(tmp_path / "b.bin")
    content_hash([tmp_path / "b.bin"])
    assert len(reads) == 2, "another path"


def test_a_file_that_changed_is_read_again(tmp_path, reads, monkeypatch):
    """A file of the same size whose time of change was set back is read again too."""
    settle(monkeypatch)
    file = write(tmp_path / "a.bin", b"1")
    first, times = content_hash([file]), file.stat()
    file.write_bytes(b"2")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content_hash([file]) != first and len(reads) == 2


def test_a_file_that_has_just_been_written_is_not_remembered(tmp_path, reads):
    """The file may change again without another time."""
    file = write(tmp_path / "a.bin", b"1", age=0)
    content_hash([file])
    content_hash([file])
    assert len(reads) == 2 and not memory_file().exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', "[" * 100_000])
def test_a_spoilt_memory_is_made_anew(tmp_path, monkeypatch, reads, content):
    settle(monkeypatch)
    file = write(tmp_path / "a.bin", b"1")
    memory_file().parent.mkdir(parents=True)
    memory_file().write_text(content)
    assert content_hash([file]) == content_hash([file]) and len(reads) == 1


def test_without_a_place_for_the_memory(tmp_path, monkeypatch, reads):
    settle(monkeypatch)
    blocked = write(tmp_path / "file", b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    file = write(tmp_path / "a.bin", b"1")
    assert content_hash([file]) == content_hash([file]) and len(reads) == 2


def test_in_the_background(tmp_path, caplog):
    file = write(tmp_path / "a.bin", b"1")
    hashes = BackgroundHashes({"vae": [file], "adapter": [], "checkpoint": [tmp_path / "gone"]})
    assert hashes.all() == {"vae": content_hash([file]), "adapter": None, "checkpoint": None}
    assert "checkpoint: its content cannot be read" in caplog.text


def test_giving_up(tmp_path, monkeypatch):
    file = write(tmp_path / "a.bin", b"1")
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        content_hash([file], stop)
    monkeypatch.setattr(content_hashes, "PIECE", 1)
    endless = write(tmp_path / "large.bin", bytes(10_000_000))
    began = time.monotonic()
    BackgroundHashes({"checkpoint": [endless]}).close()
    assert time.monotonic() - began < 5


def test_giving_up_while_another_process_reads(tmp_path):
    """The other process has the lock for as long as its file takes."""
    import fcntl

    file = write(tmp_path / "a.bin", b"1")
    lock = memory_file().with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        hashes, began = BackgroundHashes({"checkpoint": [file]}), time.monotonic()
        hashes.close()
        assert time.monotonic() - began < 10 and hashes.so_far() == {}
    assert BackgroundHashes({"checkpoint": [file]}).all()["checkpoint"].startswith("sha256:")


def test_names_need_not_be_text(tmp_path):
    named = write(tmp_path / "models" / os.fsdecode(b"\xff"), b"one")
    other = write(tmp_path / "models" / "other", b"two")
    assert content_hash([named, other]).startswith("sha256:")


def test_a_forked_process_does_not_keep_the_lock():
    """It may read a clip, hang, and outlive the computation during which it was forked."""
    with content_hashes._exclusively(None):
        child = os.fork()
        if not child:
            signal.pause()
    try:
        with memory_file().with_suffix(".lock").open("w") as file:
            assert content_hashes._locked(file)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
