"""Processes that read clips, each of which can be killed and replaced while it reads.

A decoder that does not return holds its whole process: no signal handler runs, and no thread beside it. So clips are
never read in the process that trains. One that takes too long costs the process that reads it, by SIGKILL.
"""

import ctypes
import gc
import logging
import os
import pickle
import selectors
import signal
import socket
import sys
import time
import traceback
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from cogvideox_sat.clips.attempts import Mark, reading, serve_as_reader
from cogvideox_sat.parallel.process_transfer import receive, send, socket_pair
from cogvideox_sat.parallel.process_watch import Reading
from sgm.errors import UserError

logger = logging.getLogger(__name__)

POLL = 0.5  # seconds between looks at the clock
TASKS_AHEAD = 2  # of a process, so that it has work while it is not given more
LARGEST_CHUNK = 32  # items that a process is given at a time
DEATH = 5  # seconds that a killed process has to end; one that waits for a dead network disk may not
PR_SET_PDEATHSIG = 1
# How a process ends whose decoder makes a mistake on one clip.
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)
REMEDY = "most likely for lack of memory; lower num_workers"


@dataclass(frozen=True)
class Done:
    """A task that ended with a result."""

    number: int
    result: Any


@dataclass(frozen=True)
class Failed:
    """A task that ended with an exception, which `raise_here` raises.

    Args:
        text: of a UserError its message, otherwise the traceback.
    """

    number: int
    kind: type[Exception]
    text: str

    def raise_here(self) -> None:
        """Raise the exception, or one that says as much."""
        if issubclass(self.kind, UserError):
            raise UserError(self.text)
        try:
            error = self.kind(f"in a process that reads clips:\n{self.text}")
        except TypeError:  # its constructor wants something else
            error = RuntimeError(f"{self.kind.__name__} in a process that reads clips:\n{self.text}")
        raise error


@dataclass(frozen=True)
class Stuck:
    """A task that came to nothing because of one clip; the process that read it is no more.

    Args:
        place: of the sample in its batch.
        name: of the clip.
        reason: why it counts as unreadable.
    """

    number: int
    place: int
    name: str
    reason: str


Outcome = Done | Failed | Stuck


@dataclass
class _Reader:
    """A process, as its parent sees it."""

    pid: int
    socket: socket.socket
    mark: Mark
    tasks: OrderedDict[int, Any] = field(default_factory=OrderedDict)  # by number, as it works on them


class ReadingProcesses:
    """Processes that carry out `work(task)`, in which clips are read inside `clips.attempts.reading`.

    Make it, and use it, in the main thread: the processes end with the thread that starts them. They are in no process
    group that a terminal or a launcher signals, and are gone when the object is, or its process, however that ends.

    Args:
        work: what is done with each task; results are sent by `parallel.process_transfer`.
        count: of processes, at least 1.
        limit: seconds for a clip.
        threads: for each process to decode a clip with; 0: as many as there are cores.
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
        """Hand in a task under a number of its own; `first`: before all that wait."""
        (self._waiting.appendleft if first else self._waiting.append)((number, task))

    def withdraw(self) -> None:
        """Forget the tasks that no process has begun."""
        self._waiting.clear()

    def being_read(self) -> list[Reading]:
        """Return what the processes are reading at the moment; any thread may ask."""
        return [reading for reader in list(self._readers) if (reading := reader.mark.get())]

    def collect(self, wait: bool = True) -> list[Outcome]:
        """Return what has become of tasks since the last call; if nothing has, wait a moment (`POLL`).

        Raises:
            UserError: a process died, and not because of a clip.
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
            with suppress(OSError):  # it has ended, which `collect` will see
                send(reader.socket, (number, task))

    def _received(self, reader: _Reader) -> list[Outcome]:
        try:
            outcome = receive(reader.socket)
        except EOFError:
            return self._replace_dead(reader)
        reader.tasks.pop(outcome.number)
        return [outcome]

    # ------------------------------------------------------------ processes

    def _start(self) -> None:
        ours, theirs = socket_pair()
        mark, parent = Mark(), os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # Python warns of threads whose locks the child might need. It needs none: it only reads.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                _serve(theirs, mark, self.work, self.threads, parent)
            finally:
                os._exit(1)
        theirs.close()
        self._readers.append(_Reader(pid, ours, mark))

    def _late(self, reader: _Reader) -> Reading | None:
        """Return what a process has been reading for too long, if it has."""
        reading = reader.mark.get()
        return reading if reading is not None and time.monotonic() - reading.began > self.limit else None

    def _replace_late(self, reader: _Reader) -> list[Outcome]:
        """Kill a process and start another one; its tasks but the one that it was stuck at are begun anew."""
        self._kill(reader)
        outcomes: list[Outcome] = []
        with suppress(EOFError, BlockingIOError):  # what it finished before, or in this very moment
            reader.socket.setblocking(False)
            while True:
                outcome = receive(reader.socket)
                reader.tasks.pop(outcome.number)
                outcomes.append(outcome)
        reading = self._late(reader)  # since it is dead, the mark is final
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
            logger.warning("process %d, which reads clips, does not end when it is killed: left alone", reader.pid)


def _status(pid: int, seconds: float) -> int | None:
    """Return a child's exit code, negative for a signal; None if it does not end in time or someone else has asked."""
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
    if os.getpid() != owner:  # a process that was forked has a copy of this list, but these are not its children
        return
    for reader in readers:
        with suppress(ProcessLookupError):
            os.kill(reader.pid, signal.SIGKILL)
        reader.socket.close()
    for reader in readers:
        _status(reader.pid, DEATH)
    readers.clear()


# ---------------------------------------------------------------- in the process


def _serve(source: socket.socket, mark: Mark, work: Callable[[Any], Any], threads: int, parent: int) -> None:
    """Carry out tasks until there will be no more."""
    # What the parent has left to be collected may own threads, of process groups for instance, which do not exist here:
    # to destroy it would crash this process.
    gc.freeze()
    # The trainer ends its step and saves when it is told to stop, and needs its data until then: whoever signals the
    # process group, or all processes of a job, must not end this one.
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with suppress(AttributeError):  # not on Linux: then it ends when it next looks for a task
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    torch.set_num_threads(1)  # the threads of the parent's pool are not there, but OpenMP would wait for them
    serve_as_reader(mark, threads)
    while True:
        try:
            number, task = receive(source)
        except EOFError:
            os._exit(0)
        outcome = _outcome(number, task, work)
        mark.clear()
        try:
            send(source, outcome)
        except OSError as error:
            send(source, Failed(number, UserError, f"a clip cannot be handed over ({error.strerror}), {REMEDY}"))
        except (pickle.PicklingError, TypeError, AttributeError):  # what a dataset of the user's own may return
            send(source, Failed(number, RuntimeError, traceback.format_exc()))


def _outcome(number: int, task: Any, work: Callable[[Any], Any]) -> Outcome:
    try:
        return Done(number, work(task))
    except UserError as error:
        return Failed(number, UserError, str(error))
    except MemoryError as error:
        return Failed(number, UserError, f"a process that reads data has no memory left ({error}), {REMEDY}")
    except Exception as error:
        return Failed(number, type(error), traceback.format_exc())


# ---------------------------------------------------------------- one task a clip


def in_processes(
    work: Callable[[Any], Any],
    items: Sequence[Any],
    name: Callable[[Any], str],
    late: Callable[[Any, str], Any],
    count: int,
    limit: float,
) -> Generator[Any, None, None]:
    """Yield `work(item)` for every item, in their order; for one that takes more than `limit` seconds or crashes its
    process, `late(item, reason)`.

    Args:
        name: of an item.
        count: of processes; fewer are started for a few items.

    Raises:
        UserError: a process died, and not because of an item.
    """
    count = min(count, 1 + len(items) // LARGEST_CHUNK)
    size = max(1, min(LARGEST_CHUNK, len(items) // (4 * count)))
    chunks = [range(first, min(first + size, len(items))) for first in range(0, len(items), size)]
    reasons: dict[int, str] = {}  # by the place in `items`

    def work_through(task: tuple[range, set[int]]) -> list[Any]:
        results = []
        for place, index in enumerate(task[0]):
            with reading(place, name(items[index]), {}):
                results.append(None if index in task[1] else work(items[index]))
        return results

    if not chunks:
        return
    processes = ReadingProcesses(work_through, count, limit)
    try:
        yield from _in_order(processes, chunks, items, reasons, late)
    finally:
        processes.close()


def _in_order(
    processes: ReadingProcesses,
    chunks: Sequence[range],
    items: Sequence[Any],
    reasons: dict[int, str],
    late: Callable[[Any, str], Any],
) -> Iterator[Any]:
    for number, chunk in enumerate(chunks):
        processes.submit(number, (chunk, set()))
    finished: dict[int, list[Any]] = {}
    for number, chunk in enumerate(chunks):
        while number not in finished:
            for outcome in processes.collect():
                if isinstance(outcome, Failed):
                    outcome.raise_here()
                elif isinstance(outcome, Stuck):
                    begun = chunks[outcome.number]
                    reasons[begun[outcome.place]] = outcome.reason
                    processes.submit(outcome.number, (begun, reasons.keys() & set(begun)), first=True)
                else:
                    finished[outcome.number] = outcome.result
        for index, result in zip(chunk, finished.pop(number), strict=True):
            yield late(items[index], reasons[index]) if index in reasons else result
