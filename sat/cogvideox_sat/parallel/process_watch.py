"""Watch what each process of a run does: log long waits, and limit the time of steps.

A run consists of steps, between which its processes meet. Nobody can say how long work before a meeting takes, such as
loading, evaluating and saving; during that work, a process only has to give signs of life. The collectives within a
step finish soon once all processes have started them, and have a time limit.
A thread of each process writes into the store of torch.distributed what the process does, and reads what the others do
if this one has waited. The thread needs no collective, so that it also works while a collective hangs.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from cogvideox_sat.parallel.torch_internals import own_store

logger = logging.getLogger(__name__)
logger.setLevel(logging.WARNING)  # on every process, since any process may be the one that waits

FIRST_LINE = 30.0  # seconds of waiting before the first line in the log; each next line follows after twice the time
INTERVAL = 2.0  # seconds between two checks
LEAST_SILENCE = 60.0  # seconds without a sign of life that can be normal, while a large file is read
STORE_TIMEOUT = timedelta(seconds=20)
EXIT_CODE = 2
# Time after the limit in which this thread ends the process with a clear message, before NCCL ends it without one.
GRACE = timedelta(seconds=60)
REMEDY = "continue with --resume latest; if processes were only slow, raise collective_timeout"


class Reading(NamedTuple):
    """The clip that a process is reading.

    Args:
        began: start by `time.monotonic`, which all processes of a machine share.
        place: index of the sample in its batch.
        name: name of the clip.
    """

    began: float
    place: int
    name: str


@dataclass(frozen=True)
class Phase:
    """The work that this process is doing.

    Args:
        text: ends the sentence "rank 0 is ...".
        began: start by `time.monotonic`.
        limited: the work may not take longer than the limit of collectives.
        waiting: the process waits for other processes.
        detail: returns the clips that are being read, if the work is reading.
    """

    text: str
    began: float
    limited: bool = False
    waiting: bool = False
    detail: Callable[[], Sequence[Reading]] | None = None

    def describe(self) -> str:
        """Return the text, and the clip that has been read for the longest time."""
        readings = self.detail() if self.detail else ()
        if not readings:
            return self.text
        oldest = min(readings, key=lambda reading: reading.began)
        return f"{self.text}: {oldest.name} since {time.monotonic() - oldest.began:.0f} s"


class _Current:
    """The state of this process."""

    phase = Phase("starting", time.monotonic())
    meetings = 0  # number of meetings that this process has joined
    last_work: Callable[[], None] | None = None


def begin(text: str, limited: bool = False) -> None:
    """Set what this process does from now on."""
    _Current.phase = Phase(text, time.monotonic(), limited)


def current_text() -> str:
    """Return what this process does."""
    return _Current.phase.text


@contextmanager
def phase(text: str, detail: Callable[[], Sequence[Reading]] | None = None, waiting: bool = False) -> Iterator[None]:
    """Set what this process does within the block; afterwards, the former work starts anew."""
    before = _Current.phase
    _Current.phase = Phase(text, time.monotonic(), waiting=waiting, detail=detail)
    if waiting:
        _Current.meetings += 1
    try:
        yield
    finally:
        _Current.phase = replace(before, began=time.monotonic())


@contextmanager
def watching(limit: float, ends_slow_steps: bool) -> Iterator[None]:
    """Watch this process and the other ones within the block.

    Args:
        limit: seconds for limited work.
        ends_slow_steps: end this process when a step takes longer; for NCCL, which would end it without a clear
            message.
    """
    begin("starting")
    watch = _Watch(limit, ends_slow_steps)
    watch.start()
    try:
        yield
    finally:
        watch.stop()


@contextmanager
def before_the_end(work: Callable[[], None]) -> Iterator[None]:
    """Call `work` if the watch ends the process within the block."""
    _Current.last_work = work
    try:
        yield
    finally:
        _Current.last_work = None


def end_process(line: str) -> None:
    """Log the line and end the process at once, after the work of `before_the_end`.

    Other threads of the process may never return, and are not waited for.
    """
    logger.error("error: %s", line)
    if _Current.last_work is not None:
        with suppress(Exception):
            _Current.last_work()
    logging.shutdown()
    os._exit(EXIT_CODE)


class _Watch(threading.Thread):
    def __init__(self, limit: float, ends_slow_steps: bool):
        super().__init__(name="process watch", daemon=True)
        self.limit, self.ends_slow_steps = limit, ends_slow_steps
        self.silence = max(limit, LEAST_SILENCE)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.store = _store_of_its_own() if self.size > 1 else None
        self.stopped = threading.Event()
        self.beats = 0
        self.seen: dict[int, tuple[Any, float]] = {}  # for each process its last beat, and when it arrived
        self.said: tuple[Phase, float] | None = None  # the phase of the last line, and when the next line is due

    def stop(self) -> None:
        self.stopped.set()
        self.join(5)

    def run(self) -> None:
        while not self.stopped.wait(INTERVAL):
            try:
                self.look()
            except Exception as error:  # an error here must not disturb the run
                logger.debug("the process watch failed: %s", error)

    def look(self) -> None:
        current = _Current.phase
        seconds = time.monotonic() - current.began
        self.publish(current)
        if current.limited and self.ends_slow_steps and self.size > 1 and seconds > self.limit:
            others = self.describe(self.others(), lambda other: not other.get("limited"))
            end_process(
                f"collective_timeout: {current.text} has taken more than {self.limit:g} s on rank {self.rank}"
                f"{others}; {REMEDY}"
            )
        if current.waiting and seconds > FIRST_LINE / 2:
            self.look_at_others(current, seconds)
        elif self.size == 1 and current.detail and self.is_due(current, seconds):
            logger.warning("%d s of waiting: this process is %s", seconds, current.describe())

    def look_at_others(self, current: Phase, seconds: float) -> None:
        if self.store is None:
            return
        others = self.others()
        late = {rank: status for rank, status in others.items() if status.get("meetings", 0) < _Current.meetings}
        silent = {rank: status for rank, status in late.items() if status["silent"] > self.silence}
        if silent:
            end_process(
                f"collective_timeout: rank {self.rank} waited {seconds:.0f} s for {current.text}, and "
                f"{self.names(silent)} gave no sign of life for {self.silence:g} s; {REMEDY}"
            )
        first = all(rank in late for rank in range(self.rank))  # only one of the waiting processes logs
        if first and late and self.is_due(current, seconds):
            what = self.describe(late, lambda _: True)
            logger.warning("rank %d has waited %d s for %s%s", self.rank, seconds, current.text, what)

    def is_due(self, current: Phase, seconds: float) -> bool:
        """Return whether a line about a phase is due.

        Lines are due after `FIRST_LINE` seconds, then each time after twice the time.
        """
        if self.said is None or self.said[0] is not current:
            self.said = current, FIRST_LINE
        if seconds < self.said[1]:
            return False
        self.said = current, 2 * seconds
        return True

    # ------------------------------------------------------------ the store

    def publish(self, current: Phase) -> None:
        if self.store is None:
            return
        self.beats += 1
        status = {
            "beat": self.beats,
            "meetings": _Current.meetings,
            "text": current.describe(),
            "seconds": time.monotonic() - current.began,
            "limited": current.limited,
        }
        with suppress(Exception):  # the process that holds the store may have ended
            self.store.set(f"watch/{self.rank}", json.dumps(status))

    def others(self) -> dict[int, dict[str, Any]]:
        """Return the last status of the other processes, with the seconds since, as `silent`."""
        found = {}
        for rank in set(range(self.size)) - {self.rank}:
            status: dict[str, Any] = {}
            with suppress(Exception):
                if self.store is not None and self.store.check([f"watch/{rank}"]):
                    status = json.loads(self.store.get(f"watch/{rank}"))
            now = time.monotonic()
            if rank not in self.seen or (status and self.seen[rank][0] != status["beat"]):
                self.seen[rank] = status.get("beat"), now
            found[rank] = {**status, "silent": now - self.seen[rank][1]}
        return found

    def describe(self, others: dict[int, dict[str, Any]], chosen: Callable[[dict[str, Any]], bool]) -> str:
        """Return what the first chosen process does, and how many more there are.

        The text ends a sentence.
        """
        several = {rank: status for rank, status in sorted(others.items()) if chosen(status)}
        if not several:
            return ""
        rank, status = next(iter(several.items()))
        if status["silent"] > 5 * INTERVAL or "text" not in status:
            what = f"has given no sign of life for {status['silent']:.0f} s"
        else:
            what = f"is {status['text']} ({status['seconds']:.0f} s)"
        more = f", and {len(several) - 1} more ranks" if len(several) > 1 else ""
        return f": rank {rank} {what}{more}"

    def names(self, others: dict[int, Any]) -> str:
        return f"rank{'s' * (len(others) > 1)} {', '.join(map(str, sorted(others)[:8]))}"


def _store_of_its_own() -> dist.Store | None:
    """Return a connection to the store on which no other thread waits."""
    try:
        store = own_store()
        store.set_timeout(STORE_TIMEOUT)
    except (RuntimeError, NotImplementedError, AttributeError) as error:  # this store has no second connection
        logger.debug("processes are not watched: %s", error)
        return None
    return store
