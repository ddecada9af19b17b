"""Jobs run one after the other, tell how far they are, and end when they are cancelled."""

import threading
import time

import pytest

from cogvideox_sat.web import jobs
from cogvideox_sat.web.jobs import Cancelled, JobQueue
from sgm.errors import UserError


class Steps:
    """Runner whose tasks are numbers of steps that wait for their release.

    The task -1 fails with a user error, and -2 with an unexpected exception.
    """

    def __init__(self):
        self.go = threading.Semaphore(0)
        self.done: list[int] = []
        self.closed = False

    def run(self, task, update, is_cancelled):
        if task == -1:
            raise UserError("steps: got -1;\nexpected more")
        if task == -2:
            raise ZeroDivisionError("secret")
        for step in range(task):
            update(stage="sampling", step=step, steps=task, preview=b"jpeg" if step == 1 else None)
            while not self.go.acquire(timeout=0.01):
                if is_cancelled():
                    raise Cancelled
        self.done.append(task)
        return f"{task}.mp4"

    def close(self):
        self.closed = True


@pytest.fixture
def runner():
    return Steps()


@pytest.fixture
def queue(runner):
    queue = JobQueue(runner)
    yield queue
    queue.close()
    assert runner.closed


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def test_jobs_run_in_their_order_and_tell_how_far_they_are(queue, runner):
    first, second = queue.submit(3, "first"), queue.submit(1, "second")
    until(lambda: first.state == jobs.RUNNING)
    assert (second.state, queue.position(second), queue.live()) == (jobs.WAITING, 1, [first, second])
    runner.go.release(2)
    until(lambda: first.step == 2)
    assert (first.stage, first.steps, first.preview) == ("sampling", 3, b"jpeg"), "the last preview stays"
    runner.go.release(2)
    until(lambda: second.is_over)
    assert runner.done == [3, 1]
    assert (first.state, first.result, second.result) == (jobs.DONE, "3.mp4", "1.mp4")
    assert queue.live() == []


def test_a_job_that_runs_is_cancelled_and_the_next_one_runs(queue, runner):
    first, second = queue.submit(5, "first"), queue.submit(1, "second")
    until(lambda: first.state == jobs.RUNNING)
    assert queue.cancel(first.id)
    until(lambda: first.state == jobs.CANCELLED)
    runner.go.release()
    until(lambda: second.state == jobs.DONE)
    assert not queue.cancel(first.id)


def test_a_job_that_waits_is_cancelled_at_once(queue, runner):
    first, second = queue.submit(1, "first"), queue.submit(1, "second")
    until(lambda: first.state == jobs.RUNNING)
    assert queue.cancel(second.id)
    assert second.state == jobs.CANCELLED
    runner.go.release()
    until(lambda: first.state == jobs.DONE)
    assert runner.done == [1]


def test_who_does_not_know_the_id_cancels_nothing(queue):
    job = queue.submit(1, "first")
    assert not any(queue.cancel(other) for other in ("", "1", None, 7, job.id + "x"))
    assert queue.get(job.id) is job


def test_a_mistake_is_one_line(queue):
    job = queue.submit(-1, "wrong")
    until(lambda: job.is_over)
    assert (job.state, job.message) == (jobs.FAILED, "steps: got -1; expected more")


def test_an_error_of_the_program_ends_one_job_alone(queue, runner):
    broken, next_one = queue.submit(-2, "broken"), queue.submit(1, "next")
    runner.go.release()
    until(lambda: next_one.is_over)
    assert (broken.state, next_one.state) == (jobs.FAILED, jobs.DONE)
    assert "ZeroDivisionError" in broken.message
    assert "secret" not in broken.message


def test_the_queue_does_not_grow_without_end(queue, monkeypatch):
    monkeypatch.setattr(jobs, "LONGEST", 2)
    running = queue.submit(1, "running")
    until(lambda: running.state == jobs.RUNNING)
    queue.submit(1, "a"), queue.submit(1, "b")
    with pytest.raises(UserError, match="queue: 2 videos wait already; try again later"):
        queue.submit(1, "c")


def test_old_jobs_are_forgotten(queue, runner, monkeypatch):
    monkeypatch.setattr(jobs, "KEPT", 1)
    made = [queue.submit(0, str(number)) for number in range(3)]
    until(lambda: made[-1].is_over)
    queue.submit(0, "last")
    assert [queue.get(job.id) is not None for job in made] == [False, False, True]


def test_closing_ends_what_runs(runner):
    queue = JobQueue(runner)
    first, second = queue.submit(9, "first"), queue.submit(9, "second")
    until(lambda: first.state == jobs.RUNNING)
    queue.close()
    assert first.state == jobs.CANCELLED
    assert second.state == jobs.WAITING
    assert runner.done == []
