"""Queue of the page, whose jobs run one after the other and can be cancelled.

Nothing here knows what a job does, or who looks at it: a job goes on when nobody does.
"""

import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, Protocol

from sgm.errors import UserError, one_line

logger = logging.getLogger(__name__)

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
LONGEST = 100  # jobs that may wait
KEPT = 100  # jobs that have ended and can still be asked about


class Cancelled(Exception):
    """A job ends since it was cancelled."""


@dataclass
class Job:
    """A job, and how far it is.

    Attributes:
        id: a secret name: who knows it may follow and cancel the job.
        title: what it makes, as the page shows it.
        task: what `Runner.run` gets.
        state: waiting, running, done, failed or cancelled.
        stage, step, steps: of what runs, as `python_api.call_progress.Update` has them.
        preview: a picture of the present estimate, JPEG; None: there is none yet.
        message: why it failed, in one line.
        result: what it made.
        version: grows with each change.
    """

    title: str
    task: Any
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    state: str = WAITING
    stage: str = ""
    step: int = 0
    steps: int = 0
    preview: bytes | None = None
    message: str = ""
    result: str = ""
    version: int = 0
    started: float | None = None
    seconds: float = 0.0
    cancelled: bool = False

    @property
    def is_over(self) -> bool:
        return self.state in (DONE, FAILED, CANCELLED)


class Runner(Protocol):
    """Worker that runs the tasks of a queue."""

    def run(self, task: Any, update: Callable[..., None], is_cancelled: Callable[[], bool]) -> str:
        """Return what the task made.

        Args:
            update: takes `stage`, `step`, `steps` and `preview`, see `Job`.

        Raises:
            UserError: the task cannot be done.
            Cancelled: `is_cancelled` was true.
        """
        ...

    def close(self) -> None: ...


class JobQueue:
    """Runs jobs one after the other in a thread of its own."""

    def __init__(self, runner: Runner):
        self._runner = runner
        self._changed = threading.Condition()
        self._jobs: dict[str, Job] = {}  # in the order in which they came
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)
        self._thread.start()

    def submit(self, task: Any, title: str) -> Job:
        """Return a job that waits for its turn.

        Raises:
            UserError: too many wait.
        """
        with self._changed:
            if len(self.waiting()) >= LONGEST:
                raise UserError(f"queue: {LONGEST} videos wait already; try again later")
            job = Job(title, task)
            self._jobs[job.id] = job
            over = [each.id for each in self._jobs.values() if each.is_over]
            for old in over[: max(0, len(over) - KEPT)]:
                del self._jobs[old]
            self._changed.notify_all()
        return job

    def waiting(self) -> list[Job]:
        """Return the jobs that wait, the next one first."""
        with self._changed:
            return [job for job in self._jobs.values() if job.state == WAITING]

    def live(self) -> list[Job]:
        """Return the jobs that run or wait, in the order of their turns."""
        with self._changed:
            return [job for job in self._jobs.values() if not job.is_over]

    def get(self, job_id: object) -> Job | None:
        """Return the job of an id; None: it is not known, or no longer."""
        with self._changed:
            return self._jobs.get(job_id) if isinstance(job_id, str) else None

    def position(self, job: Job) -> int:
        """Return how many jobs come before one that waits."""
        live = self.live()
        return live.index(job) if job in live else 0

    def cancel(self, job_id: object) -> bool:
        """End a job, at its next step if it runs; return whether there was something to end."""
        with self._changed:
            job = self.get(job_id)
            if job is None or job.is_over:
                return False
            job.cancelled = True
            if job.state == WAITING:
                self._set(job, state=CANCELLED)
            return True

    def wait(self, job: Job, version: int, seconds: float) -> int:
        """Return the version of a job once it differs from `version`, or after so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: job.version != version or self._closed, seconds)
            return job.version

    def close(self) -> None:
        """End the job that runs, and start no other; return once the runner has ended."""
        with self._changed:
            self._closed = True
            for job in self.live():
                job.cancelled = True
            self._changed.notify_all()
        self._runner.close()
        self._thread.join(10)

    # Within the thread

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                result = self._runner.run(job.task, partial(self._update, job), partial(is_cancelled, job))
                self._set(job, state=DONE, result=result, preview=None)
            except Cancelled:
                self._set(job, state=CANCELLED, preview=None)
            except UserError as error:
                self._set(job, state=FAILED, message=one_line(str(error)), preview=None)
            except Exception as error:
                logger.exception("a job failed by an error of the program")
                message = f"an error of the program, {type(error).__name__}; its log says more"
                self._set(job, state=FAILED, message=message, preview=None)

    def _next(self) -> Job | None:
        """Return the job whose turn it is, once there is one; None: the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.waiting())
            if self._closed:
                return None
            job = self.waiting()[0]
            job.started = monotonic()
            self._set(job, state=RUNNING)
            return job

    def _update(self, job: Job, **changes: Any) -> None:
        if changes.get("preview") is None:
            changes.pop("preview", None)
        self._set(job, **changes)

    def _set(self, job: Job, **changes: Any) -> None:
        with self._changed:
            for name, value in changes.items():
                setattr(job, name, value)
            if job.started is not None:
                job.seconds = monotonic() - job.started
            job.version += 1
            self._changed.notify_all()


def is_cancelled(job: Job) -> bool:
    """Return whether a job is to end."""
    return job.cancelled
