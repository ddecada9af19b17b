"""A job in a thread: one at a time, its error where it is waited for, and a limit."""

import threading
import time

import pytest

from cogvideox_sat.parallel import process_watch
from cogvideox_sat.runs import background_writing
from cogvideox_sat.runs.background_writing import BackgroundWriter, settled_at_the_end, wait_while_growing
from sgm.errors import UserError


def fail():
    raise KeyError("lost")


def test_a_job_is_over_once_it_is_finished():
    writer, go, done = BackgroundWriter(), threading.Event(), []
    writer.finish()
    for number in range(2):
        go.clear()
        writer.start("it", lambda number=number: (go.wait(60), done.append(number)))
        assert len(done) == number
        go.set()
        writer.finish()
        assert done[-1] == number and not writer.failed


def test_an_error_is_raised_where_the_job_is_waited_for():
    writer = BackgroundWriter()
    writer.start("it", fail)
    writer._thread.join(60)
    assert writer.failed
    with pytest.raises(KeyError, match="lost"):
        writer.finish()
    assert not writer.failed


def test_a_disk_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(background_writing, "LIMIT", 0.1)
    writer, go = BackgroundWriter(), threading.Event()
    writer.start("the checkpoint of step 4", lambda: go.wait(60))
    with pytest.raises(UserError, match=r"cannot write the checkpoint of step 4: .* in 0\.1 s; the previous"):
        writer.finish()
    start = time.monotonic()
    writer.settle()  # nobody waits for it again
    assert time.monotonic() - start < 5
    go.set()


def test_a_block_that_fails_waits_and_fails_as_before(caplog):
    writer = BackgroundWriter()
    writer.start("it", lambda: (time.sleep(0.2), fail()))
    with pytest.raises(ValueError, match="mine"), settled_at_the_end(writer.settle):
        raise ValueError("mine")
    assert "it is not written: 'lost'" in caplog.text


def test_the_process_watch_waits_too(monkeypatch):
    ended = []
    monkeypatch.setattr(process_watch.os, "_exit", lambda code: ended.append(code))
    monkeypatch.setattr(process_watch.logging, "shutdown", lambda: None)
    with settled_at_the_end(lambda: ended.append("settled")):
        process_watch.end_process("too late")
    process_watch.end_process("too late")
    assert ended == ["settled", 2, 2]


@pytest.mark.slow
def test_waiting_for_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(background_writing, "SILENCE", 0.5)
    monkeypatch.setattr(background_writing, "INTERVAL", 0.05)
    wait_while_growing(tmp_path / "gone")
    folder = tmp_path / ".2.part"
    folder.mkdir()
    stop = time.monotonic() + 1
    written = []

    def write():
        while time.monotonic() < stop:
            written.append("more")
            (folder / "file").write_text("".join(written))
            time.sleep(0.05)

    thread = threading.Thread(target=write)
    thread.start()
    wait_while_growing(folder)  # there it stays: its process was killed
    assert time.monotonic() >= stop
    thread.join()
