"""The client passes on the sampling process's messages and restarts a dead process."""

import gc
import multiprocessing
import os
import time

import pytest

from cogvideox_sat.web import sampler, sampling_process
from cogvideox_sat.web.jobs import Cancelled
from cogvideox_sat.web.sampler import Sampler
from sgm.errors import UserError


def pretended(connection, models):
    """Do what each task says."""
    for model in models:
        connection.send(("model", model, "" if model != "bad" else "bad: it is broken"))
    while True:
        kind, number, *rest = connection.recv()
        if kind == "cancel":
            connection.send(("cancelled", number))
        elif rest[0] == "dies":
            os._exit(-9 & 0xFF)
        elif rest[0] == "fails":
            connection.send(("failed", number, "steps is 0"))
        elif rest[0] == "loads":
            connection.send(("update", number, {"stage": "loading"}))
        elif rest[0] == "goes on":
            connection.send(("update", number, {"stage": "sampling", "step": 1, "steps": 2}))
        else:
            connection.send(("done", number, "a.mp4"))


@pytest.fixture
def page(monkeypatch):
    monkeypatch.setattr(sampling_process, "run", pretended)
    monkeypatch.setattr(sampler, "CONTEXT", multiprocessing.get_context("fork"))
    gc.collect()  # see `sgm.forking`
    page = Sampler(["good", "bad"])
    yield page
    page.close()
    assert page._process is None or not page._process.is_alive()


def nothing(**_):
    pass


def test_it_returns_what_was_made_and_tells_of_models(page):
    assert page.run("makes", nothing, lambda: False) == "a.mp4"
    assert page.look() == {"good": "", "bad": "bad: it is broken"}


def test_it_raises_what_failed(page):
    with pytest.raises(UserError, match=r"^steps is 0$"):
        page.run("fails", nothing, lambda: False)


@pytest.mark.parametrize("task", ["goes on", "loads"])
def test_it_cancels(page, task):
    seen = []
    with pytest.raises(Cancelled):
        page.run(task, lambda **changes: seen.append(changes["stage"]), lambda: len(seen) > 1)
    assert seen == ["starting", "sampling" if task == "goes on" else "loading"]
    assert page.run("makes", nothing, lambda: False) == "a.mp4", "the answer to an older task is not taken for its own"


def test_a_process_that_died_is_told_of_and_started_anew(page):
    with pytest.raises(UserError, match=r"sampling: its process has ended with code 247.*starts anew"):
        page.run("dies", nothing, lambda: False)
    assert page.run("makes", nothing, lambda: False) == "a.mp4"


def test_models_are_told_of_while_nothing_runs(page):
    page.start()
    end = time.monotonic() + 5
    while len(page.look()) < 2:
        assert time.monotonic() < end


def test_a_closed_one_makes_nothing(page):
    page.close()
    with pytest.raises(Cancelled):
        page.run("makes", nothing, lambda: False)
