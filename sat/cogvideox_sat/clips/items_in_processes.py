"""Compute a result for each of many items in reading processes, in order."""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from cogvideox_sat.clips.attempts import reading
from cogvideox_sat.clips.reading_outcomes import Failed, Stuck
from cogvideox_sat.clips.reading_processes import ReadingProcesses

LARGEST_CHUNK = 32  # items per task


def in_processes(
    work: Callable[[Any], Any],
    items: Sequence[Any],
    name: Callable[[Any], str],
    late: Callable[[Any, str], Any],
    count: int,
    limit: float,
) -> Generator[Any, None, None]:
    """Yield `work(item)` for every item, in order, computed in processes.

    For an item that takes more than `limit` seconds or crashes its process, yield `late(item, reason)`.

    Args:
        name: a function that returns the name of an item.
        late: returns the result for an item that could not be computed, given the reason.
        count: number of processes; fewer are started for few items.
        limit: seconds for an item.

    Raises:
        UserError: a process died for another reason than an item.
    """
    count = min(count, 1 + len(items) // LARGEST_CHUNK)
    size = max(1, min(LARGEST_CHUNK, len(items) // (4 * count)))
    chunks = [range(first, min(first + size, len(items))) for first in range(0, len(items), size)]
    reasons: dict[int, str] = {}  # by the index in `items`

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
    """Yield the results of all chunks; a chunk with a late item is computed again without it.

    Args:
        reasons: filled with the reasons of late items, by their index in `items`.
    """
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
