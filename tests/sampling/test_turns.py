"""Work that reports by a callback waits for its caller, and ends with it."""

import threading
from contextlib import nullcontext
from contextvars import ContextVar

import pytest
import torch

from cogvideox_sat.sampling.turns import RandomNumbers, StoppedWork, in_turns


def test_the_work_waits_until_its_next_report_is_wanted():
    done = []

    def work(report):
        for number in range(3):
            done.append(number)
            report(number)

    reports = in_turns(work, nullcontext())
    assert done == []
    assert next(reports) == 0 and done == [0]
    assert list(reports) == [1, 2] and done == [0, 1, 2]


def test_work_that_reports_nothing_is_done_all_the_same():
    done = []
    assert list(in_turns(lambda report: done.append(1), nullcontext())) == [] and done == [1]


def test_closing_stops_the_work_and_its_thread():
    """Handlers of the work for exceptions of its own do not keep it, and its `finally` runs."""
    ends, before = [], threading.active_count()

    def work(report):
        try:
            while True:
                try:
                    report(1)
                except Exception:
                    ends.append("swallowed")
        except StoppedWork:
            ends.append("stopped")
            raise

    reports = in_turns(work, nullcontext())
    assert next(reports) == 1
    reports.close()
    assert ends == ["stopped"] and threading.active_count() == before


@pytest.mark.parametrize("error", [ValueError("planted"), KeyboardInterrupt()])
def test_an_error_of_the_work_is_raised_where_it_happened(error):
    def work(report):
        report(1)
        raise error

    reports = in_turns(work, nullcontext())
    next(reports)
    with pytest.raises(type(error)) as caught:
        next(reports)
    assert caught.value is error and caught.traceback[-1].name == "work"


def test_the_work_sees_the_surroundings_of_its_caller():
    variable = ContextVar("variable", default="default")
    variable.set("set")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        seen = list(in_turns(lambda report: report((variable.get(), torch.get_num_threads())), nullcontext()))
    finally:
        torch.set_num_threads(threads)
    assert seen == [("set", threads + 1)]


def test_random_numbers_are_the_works_own():
    def draw(report):
        torch.manual_seed(1)
        for _ in range(3):
            report(torch.rand(1))

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(2)
    others = torch.rand(3)
    torch.manual_seed(2)
    pairs = [(drawn, torch.rand(1)) for drawn in in_turns(draw, RandomNumbers(torch.device("cpu")))]
    assert torch.equal(torch.cat([mine for mine, _ in pairs]), expected)
    assert torch.equal(torch.cat([other for _, other in pairs]), others)
