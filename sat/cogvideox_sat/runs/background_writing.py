"""Write files in the background of a run: one job at a time, in a thread.

This module imports no PyTorch.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Generic, TypeVar

from cogvideox_sat.parallel import process_watch
from sgm.errors import UserError

logger = logging.getLogger(__name__)

Content = TypeVar("Content")

LIMIT = 3600.0  # seconds that a run waits for the writer; a disk that takes longer is broken
SILENCE = 30.0  # seconds without a change of a folder, after which its writer counts as ended
INTERVAL = 0.2  # seconds between two checks of such a folder


class BackgroundWriter:
    """Runs one job at a time in a thread.

    The thread must not take part in collectives of groups that the steps use, and must not draw random numbers.
    """

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._what = ""
        self._error: BaseException | None = None

    def start(self, what: str, job: Callable[[], object]) -> None:
        """Begin a job; the job before must be finished.

        Args:
            what: what is written, for messages: "the checkpoint of step 4".
        """
        assert self._thread is None, self._what
        self._what = what
        # A daemon, so that it does not keep a process alive that has given up waiting.
        self._thread = Thread(target=self._run, args=(job,), name="checkpoint writer", daemon=True)
        self._thread.start()

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:  # `finish` raises it
            self._error = error

    @property
    def busy(self) -> bool:
        """Return whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Return whether the job has ended with an error, which `finish` raises."""
        return self._error is not None

    def finish(self) -> None:
        """Wait for the current job, if any, and raise its error.

        Raises:
            UserError: the job takes longer than `LIMIT`.
        """
        thread, self._thread = self._thread, None  # the run waits only once, even after an error
        if thread is None:
            return
        with process_watch.phase(f"writing {self._what}"):
            thread.join(LIMIT)
        if thread.is_alive():
            raise UserError(
                f"cannot write {self._what}: the disk has not stored it in {LIMIT:g} s; the previous checkpoint is "
                "kept: check the disk and continue with --resume latest"
            )
        error, self._error = self._error, None
        if error is not None:
            raise error

    def settle(self) -> None:
        """Wait for the job at the end of a failed run; errors of the job are only logged."""
        if self.busy:
            logger.warning("the run ends when %s is written", self._what)
        what = self._what
        try:
            self.finish()
        except Exception as error:
            logger.warning("%s is not written: %s", what, error)


class BackgroundSaver(ABC, Generic[Content]):
    """Base of savers of checkpoints, which write at most one checkpoint at a time.

    All processes call `finish`; those that write have a thread.

    Attributes:
        unfinished: the checkpoint that this or another process is writing; None: none.
    """

    def __init__(self) -> None:
        self.thread = BackgroundWriter()
        self.unfinished: Content | None = None

    @abstractmethod
    def on_all(self, finish: Callable[[], None], content: Content) -> None:
        """Call `finish`, and raise the error of one process on all of them."""

    def await_writer(self, content: Content) -> None:
        """Wait for another process that writes, if this process must not end before it.

        This implementation does not wait.
        """

    def write_behind(self, step: int, since: float, write: Callable[[], object]) -> None:
        """Write a checkpoint in the thread.

        Args:
            since: time by `time.perf_counter` at which copying began.
        """
        taken = time.perf_counter() - since
        logger.info("step %d: copied in %.2f s, to be written in the background", step, taken)
        self.thread.start(f"the checkpoint of step {step}", write)

    @property
    def failed(self) -> bool:
        """Return whether this process failed to write the current checkpoint."""
        return self.thread.failed

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any.

        Raises:
            UserError: it cannot be written; the previous checkpoint is kept. On all processes.
        """
        if self.unfinished is not None:
            content, self.unfinished = self.unfinished, None
            self.on_all(self.thread.finish, content)

    def settle(self) -> None:
        """Wait for the checkpoint when the run ends with an error.

        Other processes need not call this.
        """
        if self.unfinished is not None:
            self.await_writer(self.unfinished)
        self.thread.settle()


@contextmanager
def settled_at_the_end(settle: Callable[[], None]) -> Iterator[None]:
    """Call `settle` if the block fails, or if the process watch ends the process within it."""
    with process_watch.before_the_end(settle):
        try:
            yield
        except BaseException:
            settle()
            raise


def wait_while_growing(folder: Path) -> None:
    """Wait until another process has finished writing a folder.

    The folder is then gone, or nothing in it has changed for `SILENCE`.
    """
    seen, since = -1, time.monotonic()
    while folder.exists() and time.monotonic() - since < SILENCE:
        size = 0
        with suppress(OSError):  # a file was removed in between
            size = sum(path.stat().st_size for path in folder.rglob("*"))
        if size != seen:
            seen, since = size, time.monotonic()
        time.sleep(INTERVAL)
