"""Read clips in processes, each of which can be killed and replaced while it reads.

A decoder that does not return blocks its whole process: neither signal handlers nor other threads run. So clips are
never read in the training process. If a clip takes too long, the process that reads it is killed by SIGKILL.
"""

import logging
import os
import selectors
import signal
import socket
import sys
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cogvideox_sat.clips.attempts import Mark
from cogvideox_sat.clips.reading_outcomes import Outcome, Stuck
from cogvideox_sat.clips.reading_worker import REMEDY, serve
from cogvideox_sat.files.refusals import refusal
from cogvideox_sat.parallel.process_transfer import receive, send, socket_pair
from cogvideox_sat.parallel.process_watch import Reading
from sgm.errors import UserError
from sgm.forking import garbage_left_alone

logger = logging.getLogger(__name__)

POLL = 0.5  # seconds between checks of the time limit
TASKS_AHEAD = 2  # tasks that a process holds, so that it does not wait for new ones
DEATH = 5  # seconds in which a killed process ends; one that waits for a dead network disk may not
# Signals that end a process whose decoder crashes on a clip.
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)


@dataclass
class _Reader:
    """Process as its parent sees it."""

    pid: int
    socket: socket.socket
    mark: Mark
    tasks: OrderedDict[int, Any] = field(default_factory=OrderedDict)  # by number, in the order of work


class ReadingProcesses:
    """Processes that run `work(task)`, which reads clips inside `clips.attempts.reading`.

    Create and use this object in the main thread: the processes end with the thread that starts them. They are not in
    the process group that a terminal or a launcher signals, and they end with the object or its process, however that
    ends.

    Args:
        work: the function to run for each task; results are sent by `parallel.process_transfer`.
        count: number of processes, at least 1.
        limit: seconds for a clip.
        threads: threads of each process that decode a clip; 0: as many as there are cores.
    """

    def __init__(self, work: Callable[[Any], Any], count: int, limit: float, threads: int = 1):
        self.work, self.limit, self.threads = work, limit, threads
        self._waiting: deque[tuple[int, Any]] = deque()
        self._readers: list[_Reader] = []
        weakref.finalize(self, _end, self._readers, os.getpid())
        for _ in range(count):
            self._start()

    def close(self) -> None:
        """End all processes."""
        _end(self._readers, os.getpid())

    def submit(self, number: int, task: Any, first: bool = False) -> None:
        """Submit a task under a unique number; with `first`, before all waiting tasks."""
        (self._waiting.appendleft if first else self._waiting.append)((number, task))

    def withdraw(self) -> None:
        """Forget the tasks that no process has begun."""
        self._waiting.clear()

    def being_read(self) -> list[Reading]:
        """Return the reads that are going on; this may be called from any thread."""
        return [reading for reader in list(self._readers) if (reading := reader.mark.get())]

    def collect(self, wait: bool = True) -> list[Outcome]:
        """Return the outcomes of tasks since the last call; if there are none, wait up to `POLL`.

        Raises:
            UserError: a process died for another reason than a clip, or this process has too many open files.
        """
        self._assign()
        outcomes: list[Outcome] = []
        with selectors.DefaultSelector() as selector:
            for reader in self._readers:
                selector.register(reader.socket, selectors.EVENT_READ, reader)
            for key, _ in selector.select(POLL if wait else 0):
                outcomes += self._received(key.data)
        for reader in list(self._readers):
            if self._late(reader) is not None:
                outcomes += self._replace_late(reader)
        self._assign()
        return outcomes

    # ------------------------------------------------------------ tasks

    def _assign(self) -> None:
        while self._waiting:
            reader = min(self._readers, key=lambda reader: len(reader.tasks))
            if len(reader.tasks) >= TASKS_AHEAD:
                return
            number, task = self._waiting.popleft()
            reader.tasks[number] = task
            with suppress(ConnectionError):  # the process has ended, which `collect` handles
                send(reader.socket, (number, task))

    def _received(self, reader: _Reader) -> list[Outcome]:
        try:
            return [_receive(reader)]
        except EOFError:
            return self._replace_dead(reader)

    # ------------------------------------------------------------ processes

    def _start(self) -> None:
        ours, theirs = socket_pair()
        mark, parent = Mark(), os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        with garbage_left_alone():
            pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                serve(theirs, mark, self.work, self.threads, parent)
            finally:
                os._exit(1)
        theirs.close()
        self._readers.append(_Reader(pid, ours, mark))

    def _late(self, reader: _Reader) -> Reading | None:
        """Return the read of a process that takes too long, or None."""
        reading = reader.mark.get()
        return reading if reading is not None and time.monotonic() - reading.began > self.limit else None

    def _replace_late(self, reader: _Reader) -> list[Outcome]:
        """Kill and replace a process; all of its tasks except the one it was stuck at start again."""
        self._kill(reader)
        outcomes: list[Outcome] = []
        with suppress(EOFError, BlockingIOError):  # results that it has just finished
            reader.socket.setblocking(False)
            while True:
                outcomes.append(_receive(reader))
        reading = self._late(reader)  # the process is dead, so the mark is final
        if reading is not None and reader.tasks:
            outcomes.append(self._blame(reader, reading, f"not read within {self.limit:g} s (clip_timeout)"))
        self._replace(reader)
        return outcomes

    def _replace_dead(self, reader: _Reader) -> list[Outcome]:
        status, reading = _status(reader.pid, DEATH), reader.mark.get()
        if status is None or -status not in CRASHES or reading is None or not reader.tasks:
            self._readers.remove(reader)
            how = "it ended" if status is None or status >= 0 else f"signal {signal.Signals(-status).name}"
            raise UserError(f"a process that reads data died (pid {reader.pid}, {how}), {REMEDY}")
        name = signal.Signals(-status).name
        blamed = self._blame(reader, reading, f"the process that read it crashed ({name})")
        self._replace(reader)
        return [blamed]

    def _blame(self, reader: _Reader, reading: Reading, reason: str) -> Stuck:
        number, _ = reader.tasks.popitem(last=False)
        logger.warning("%s: %s; the process that read it is replaced", reading.name, reason)
        return Stuck(number, reading.place, reading.name, reason)

    def _replace(self, reader: _Reader) -> None:
        self._waiting.extendleft(reversed(reader.tasks.items()))
        self._readers.remove(reader)
        reader.socket.close()
        self._start()

    def _kill(self, reader: _Reader) -> None:
        with suppress(ProcessLookupError):
            os.kill(reader.pid, signal.SIGKILL)
        if _status(reader.pid, DEATH) is None:
            logger.warning("process %d, which reads clips, does not end when it is killed, and is ignored", reader.pid)


def _receive(reader: _Reader) -> Outcome:
    """Return the next outcome that a process has sent, whose task is then finished.

    Raises:
        EOFError: the process has ended.
        BlockingIOError: nothing has arrived, and the socket does not block.
        UserError: this process has too many open files.
    """
    try:
        outcome = receive(reader.socket)
    except BlockingIOError:
        raise
    except OSError as error:
        raise UserError(f"a clip cannot be received from the process that read it: {refusal(error)}") from error
    reader.tasks.pop(outcome.number)
    return outcome


def _status(pid: int, seconds: float) -> int | None:
    """Return a child's exit code, negative for a signal; None if it does not end in time.

    The result is also None if another caller has already waited for the child.
    """
    deadline, pause = time.monotonic() + seconds, 0.001
    while True:
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return None
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def _end(readers: list[_Reader], owner: int) -> None:
    if os.getpid() != owner:  # a forked process has a copy of this list, but these are not its children
        return
    for reader in readers:
        with suppress(ProcessLookupError):
            os.kill(reader.pid, signal.SIGKILL)
        reader.socket.close()
    for reader in readers:
        _status(reader.pid, DEATH)
    readers.clear()
