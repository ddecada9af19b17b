"""Client of the sampling process, which starts it, sends tasks and restarts it."""

import logging
import multiprocessing
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from cogvideox_sat.web import sampling_process
from cogvideox_sat.web.jobs import Cancelled
from cogvideox_sat.web.models import OfferedModel
from cogvideox_sat.web.sampling_process import VideoTask
from sgm.errors import UserError

logger = logging.getLogger(__name__)

CONTEXT: Any = multiprocessing.get_context("spawn")  # threads and PyTorch do not survive a fork
ANSWER = 0.1  # seconds between two looks at whether a job is cancelled
PATIENCE = 5.0  # seconds for the process to end by itself


class Sampler:
    """A process that samples, as a `jobs.Runner`.

    Attributes:
        loaded: by model "" once it can be used, or why it cannot.
    """

    def __init__(self, models: Sequence[OfferedModel]):
        self.models = list(models)
        self.loaded: dict[str, str] = {}
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._number = 0
        self._closed = False
        self._taken = threading.Lock()  # the connection, by who reads from it

    def start(self) -> None:
        """Start the process, which begins to load the models."""
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=sampling_process.run, args=(theirs, self.models), name="sampler", daemon=True)
        process.start()
        theirs.close()
        self.loaded = {}
        self._process, self._connection = process, ours

    def run(self, task: VideoTask, update: Callable[..., None], is_cancelled: Callable[[], bool]) -> str:
        """Return the name of the file of a video, see `jobs.Runner.run`."""
        self._number += 1
        if self._closed:
            raise Cancelled
        update(stage="starting")
        try:
            if self._process is None or not self._process.is_alive():
                self.start()
            with self._taken:
                return self._answer(self._number, task, update, is_cancelled)
        except (EOFError, OSError) as error:
            if self._closed:
                raise Cancelled from error
            raise UserError(self._obituary()) from error

    def _answer(
        self, number: int, task: VideoTask, update: Callable[..., None], is_cancelled: Callable[[], bool]
    ) -> str:
        connection = self._connection
        assert connection is not None, "it is started"
        connection.send(("make", number, task))
        is_told, is_loading = False, False
        while True:
            if not is_told and is_cancelled():
                connection.send(("cancel", number))
                is_told = True
            if is_told and is_loading:
                raise Cancelled  # which the process finds once the model is loaded
            if not connection.poll(ANSWER):
                continue
            kind, *rest = connection.recv()
            if kind == "model":
                self._note(*rest)
            elif rest[0] != number:
                continue  # the end of one that was cancelled while its model was loaded
            elif kind == "update":
                is_loading = rest[1].get("stage") == "loading"
                update(**rest[1])
            elif kind == "done":
                return str(rest[1])
            elif kind == "cancelled":
                raise Cancelled
            else:
                raise UserError(rest[1])

    def _note(self, name: str, reason: str) -> None:
        self.loaded[name] = reason
        if reason:
            logger.error("error: %s", reason)
        else:
            logger.info("%s is loaded", name)

    def look(self) -> dict[str, str]:
        """Return `loaded`, with the models that have been loaded meanwhile."""
        if self._taken.acquire(blocking=False):  # else a task runs, and takes note of them
            try:
                while self._connection is not None and self._connection.poll():
                    kind, *rest = self._connection.recv()
                    if kind == "model":
                        self._note(*rest)
            except (EOFError, OSError):
                pass
            finally:
                self._taken.release()
        return self.loaded

    def _obituary(self) -> str:
        process = self._process
        assert process is not None, "it was started"
        process.join(PATIENCE)
        code = process.exitcode
        reason = "for lack of memory, perhaps" if code == -9 else "see the log"
        return f"sampling: its process has ended with code {code}, {reason}; it starts anew with the next video"

    def close(self) -> None:
        """End the process."""
        self._closed = True
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.terminate()
            self._process.join(PATIENCE)
            if self._process.is_alive():
                self._process.kill()
