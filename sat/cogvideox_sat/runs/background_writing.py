"""Write files behind the steps of a run: one job at a time, in a thread. Nothing here imports PyTorch."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

from cogvideox_sat.parallel import process_watch
from sgm.errors import UserError

logger = logging.getLogger(__name__)

LIMIT = 3600.0  # seconds for what is still to be written when a run waits for it; a disk that takes longer is broken
SILENCE = 30.0  # seconds without a change of a folder, after which nobody writes into it any more
INTERVAL = 0.2  # seconds between looks at such a folder


class BackgroundWriter:
    """Runs one job at a time in a thread.

    The thread must not take part in collectives of groups that the steps use, nor draw random numbers.
    """

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._what = ""
        self._error: BaseException | None = None

    def start(self, what: str, job: Callable[[], object]) -> None:
        """Begin a job; the one before must be finished.

        Args:
            what: is written, for messages: "the checkpoint of step 4".
        """
        assert self._thread is None, self._what
        self._what = what
        # It must not keep a process alive that has given up waiting for it.
        self._thread = Thread(target=self._run, args=(job,), name="checkpoint writer", daemon=True)
        self._thread.start()

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:  # is raised where the run waits for the job
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
        """Wait for the job that was started, if any, and raise what it raised.

        Raises:
            UserError: it takes longer than `LIMIT`.
        """
        thread, self._thread = self._thread, None  # whatever comes, nobody waits for it again
        if thread is None:
            return
        with process_watch.phase(f"writing {self._what}"):
            thread.join(LIMIT)
        if thread.is_alive():
            raise UserError(
                f"cannot write {self._what}: the disk has not taken it in {LIMIT:g} s; the previous checkpoint is kept"
            )
        error, self._error = self._error, None
        if error is not None:
            raise error

    def settle(self) -> None:
        """Wait for the job at the end of a run that fails: what goes wrong with it is only logged."""
        if self.busy:
            logger.warning("the run ends once %s is written", self._what)
        what = self._what
        try:
            self.finish()
        except Exception as error:
            logger.warning("%s is not written: %s", what, error)


@contextmanager
def settled_at_the_end(settle: Callable[[], None]) -> Iterator[None]:
    """Call `settle` when the block fails, or when the process watch ends the process within it."""
    with process_watch.before_the_end(settle):
        try:
            yield
        except BaseException:
            settle()
            raise


def wait_while_growing(folder: Path) -> None:
    """Wait until another process is done with a folder: it is gone, or nothing in it changes for `SILENCE`."""
    seen, since = -1, time.monotonic()
    while folder.exists() and time.monotonic() - since < SILENCE:
        size = 0
        with suppress(OSError):  # a file is gone in between
            size = sum(path.stat().st_size for path in folder.rglob("*"))
        if size != seen:
            seen, since = size, time.monotonic()
        time.sleep(INTERVAL)
