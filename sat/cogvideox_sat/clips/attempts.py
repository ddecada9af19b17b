"""Mark the clip that a process is reading, and refuse clips that took too long before.

A dataset reads each clip inside `with attempt(name):`. In a process of `reading_processes`, the mark shows other
processes the clip that is being read and the time since when, so that a clip that takes too long can be named.
Elsewhere `attempt` has no effect, except that it refuses clips.
"""

import mmap
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch.utils.data import get_worker_info

from cogvideox_sat.media.video_facts import UnreadableClip
from cogvideox_sat.parallel.process_watch import Reading

CLIP_TIMEOUT = 120.0  # seconds, by default
LAYOUT = struct.Struct("<dqI")  # time of the begin, place, and length of the name that follows
LONGEST_NAME = 16384  # bytes; Linux has paths of up to 4096


class Mark:
    """Note in memory, shared with forked processes, about the clip that is being read."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, LAYOUT.size + LONGEST_NAME)

    def set(self, place: int, name: str) -> None:
        """Mark the beginning of a read; the clock starts."""
        text = name.encode("utf-8", "surrogateescape")[:LONGEST_NAME]
        # The time 0 means that nothing is being read, until the name is complete.
        LAYOUT.pack_into(self._memory, 0, 0.0, place, len(text))
        self._memory[LAYOUT.size : LAYOUT.size + len(text)] = text
        struct.pack_into("<d", self._memory, 0, time.monotonic())

    def clear(self) -> None:
        """Mark that nothing is being read."""
        struct.pack_into("<d", self._memory, 0, 0.0)

    def get(self) -> Reading | None:
        """Return the read that is going on, or None."""
        began, place, length = LAYOUT.unpack_from(self._memory)
        if not began:
            return None
        text = self._memory[LAYOUT.size : LAYOUT.size + length]
        return Reading(began, place, text.decode("utf-8", "surrogateescape"))


class _State:
    """State of this process."""

    mark: Mark | None = None
    threads = 0
    place = 0
    whole = ""  # the name that is marked outside of attempts
    refused: Mapping[str, str] = {}
    attempted: list[str] = []  # noqa: RUF012
    late: dict[str, str] = {}  # noqa: RUF012


def serve_as_reader(mark: Mark, threads: int) -> None:
    """Mark the attempts of this process from now on.

    Args:
        threads: threads that decode a clip; 0: as many as there are cores.
    """
    _State.mark, _State.threads = mark, threads


def decoding_threads() -> int:
    """Return the number of threads that decode a clip here; 0: as many as there are cores.

    A worker uses one thread, since workers with as many threads as cores would slow each other down.
    """
    return 1 if get_worker_info() else _State.threads


@contextmanager
def reading(place: int, name: str, refused: Mapping[str, str]) -> Iterator[list[str]]:
    """Mark a sample as being read within the block; yield a list that collects its clips.

    Args:
        place: position of the sample in its batch.
        name: the name that is marked before and after the attempts at single clips.
        refused: clips that must not be read, and the reasons.
    """
    attempted: list[str] = []
    _State.place, _State.whole, _State.attempted = place, name, attempted
    with refusing(refused):
        _mark(name)
        try:
            yield attempted
        finally:
            if _State.mark is not None:
                _State.mark.clear()


@contextmanager
def refusing(refused: Mapping[str, str]) -> Iterator[None]:
    """Let attempts at the clips in `refused` fail within the block, each with its reason."""
    before, _State.refused = _State.refused, refused
    try:
        yield
    finally:
        _State.refused = before


def reason_refused(name: str) -> str | None:
    """Return the reason why the clip `name` is refused; None if it is not refused."""
    return _State.refused.get(name)


@contextmanager
def noting_late() -> Iterator[dict[str, str]]:
    """Yield a dictionary that collects the clips that take too long to probe within the block."""
    before, _State.late = _State.late, {}
    try:
        yield _State.late
    finally:
        _State.late = before


def note_late(name: str, reason: str) -> str:
    """Note a clip that took too long, and return the reason."""
    _State.late[name] = reason
    return reason


@contextmanager
def attempt(name: str) -> Iterator[None]:
    """Mark the clip `name` as being read within the block.

    Raises:
        UnreadableClip: the clip is refused, since it took too long before.
    """
    if reason := _State.refused.get(name):
        raise UnreadableClip(reason)
    if _State.mark is not None:
        _State.attempted.append(name)
    _mark(name)
    try:
        yield
    finally:
        _mark(_State.whole)


def _mark(name: str) -> None:
    if _State.mark is not None:
        _State.mark.set(_State.place, name)
