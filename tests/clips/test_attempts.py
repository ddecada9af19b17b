"""Test that other processes see the clip being read, and refused clips are not read."""

import multiprocessing
import time

import pytest

from cogvideox_sat.clips import attempts
from cogvideox_sat.clips.attempts import Mark, attempt, note_late, noting_late, reading, reason_refused, refusing
from cogvideox_sat.media.video_facts import UnreadableClip
from sgm.forking import garbage_left_alone


@pytest.fixture
def mark(monkeypatch) -> Mark:
    """Return the mark of this process, which serves as a reader during a test."""
    for name in ("mark", "threads", "place", "whole", "attempted"):
        monkeypatch.setattr(attempts._State, name, getattr(attempts._State, name))
    mark = Mark()
    attempts.serve_as_reader(mark, threads=3)
    return mark


def test_a_mark_is_seen_by_the_process_that_made_it():
    mark = Mark()
    assert mark.get() is None
    before = time.monotonic()
    child = multiprocessing.get_context("fork").Process(target=mark.set, args=(7, "a\udcff\u00e4.mp4"))
    with garbage_left_alone():
        child.start()
    child.join()
    began, place, name = mark.get()
    assert before <= began <= time.monotonic() and (place, name) == (7, "a\udcff\u00e4.mp4")
    mark.clear()
    assert mark.get() is None


def test_names_of_any_length_fit():
    mark = Mark()
    mark.set(0, "x" * (attempts.LONGEST_NAME + 10))
    assert mark.get()[2] == "x" * attempts.LONGEST_NAME


def test_attempts_are_marked_one_after_the_other(mark):
    assert attempts.decoding_threads() == 3
    with reading(2, "the sample", {}) as attempted:
        assert mark.get()[1:] == (2, "the sample")
        for name in ("a.mp4", "b.mp4"):
            with attempt(name):
                assert mark.get()[1:] == (2, name)
        assert mark.get()[2] == "the sample"
    assert mark.get() is None and attempted == ["a.mp4", "b.mp4"]


def test_the_mark_goes_when_reading_fails(mark):
    with pytest.raises(ZeroDivisionError), reading(0, "sample", {}), attempt("a.mp4"):
        raise ZeroDivisionError
    assert mark.get() is None


def test_refused_clips_are_not_read():
    with refusing({"a.mp4": "too slow"}):
        assert reason_refused("a.mp4") == "too slow" and reason_refused("b.mp4") is None
        with pytest.raises(UnreadableClip, match="too slow"), attempt("a.mp4"):
            pytest.fail("it was read")
        with attempt("b.mp4"):
            pass
    assert reason_refused("a.mp4") is None


def test_late_clips_are_collected_within_the_block_alone():
    note_late("before.mp4", "late")
    with noting_late() as late:
        assert note_late("a.mp4", "took 3 s") == "took 3 s"
    note_late("after.mp4", "late")
    assert late == {"a.mp4": "took 3 s"}
