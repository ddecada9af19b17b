"""Marks of what a reading process is busy with, which another process sees, and clips that are not to be read again.

A dataset reads each clip inside `with attempt(name):`. In a process of `reading_processes` the mark then says which
clip is being read and since when, so that a clip that takes too long can be named. Everywhere else it has no effect.
"""

import mmap
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch.utils.data import get_worker_info

from cogvideox_sat.media.video_facts import UnreadableClip
from cogvideox_sat.parallel.process_watch import Reading

CLIP_TIMEOUT = 120.0  # seconds, unless an argument says otherwise
LAYOUT = struct.Struct("<dqI")  # when it began, the place, and the length of the name that follows
LONGEST_NAME = 16384  # bytes; Linux has paths of up to 4096


class Mark:
    """A note in memory that a process shares with those that it forks: what is being read, if anything."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, LAYOUT.size + LONGEST_NAME)

    def set(self, place: int, name: str) -> None:
        """Begin to read; the clock starts."""
        text = name.encode("utf-8", "surrogateescape")[:LONGEST_NAME]
        LAYOUT.pack_into(self._memory, 0, 0.0, place, len(text))  # until the name is whole, nothing is being read
        self._memory[LAYOUT.size : LAYOUT.size + len(text)] = text
        struct.pack_into("<d", self._memory, 0, time.monotonic())

    def clear(self) -> None:
        """Say that nothing is being read."""
        struct.pack_into("<d", self._memory, 0, 0.0)

    def get(self) -> Reading | None:
        """Return what is being read, None if nothing is."""
        began, place, length = LAYOUT.unpack_from(self._memory)
        if not began:
            return None
        text = self._memory[LAYOUT.size : LAYOUT.size + length]
        return Reading(began, place, text.decode("utf-8", "surrogateescape"))


class _State:
    """The state of this process."""

    mark: Mark | None = None
    threads = 0
    place = 0
    whole = ""  # what is marked outside of any attempt
    refused: Mapping[str, str] = {}
    attempted: list[str] = []  # noqa: RUF012
    late: dict[str, str] = {}  # noqa: RUF012


def serve_as_reader(mark: Mark, threads: int) -> None:
    """Make this process one whose attempts are marked, with `threads` to decode a clip (0: as many as cores)."""
    _State.mark, _State.threads = mark, threads


def decoding_threads() -> int:
    """Return how many threads decode a clip here; 0: as many as there are cores.

    A worker decodes alone: with as many threads in each as there are cores, workers would only slow each other down.
    """
    return 1 if get_worker_info() else _State.threads


@contextmanager
def reading(place: int, name: str, refused: Mapping[str, str]) -> Iterator[list[str]]:
    """Mark a sample as being read within the block; the list that it gives fills with the clips that are attempted.

    Args:
        place: of the sample in its batch.
        name: what is marked before and after the attempts at single clips.
        refused: clips that are not to be read, with the reason of each.
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


def refusal(name: str) -> str | None:
    """Return why the clip `name` is refused; None if it is not."""
    return _State.refused.get(name)


@contextmanager
def noting_late() -> Iterator[dict[str, str]]:
    """Collect, in the dictionary that it gives, the clips that took too long to look at within the block."""
    before, _State.late = _State.late, {}
    try:
        yield _State.late
    finally:
        _State.late = before


def note_late(name: str, reason: str) -> str:
    """Note a clip that took too long; return the reason."""
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
