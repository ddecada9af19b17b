"""The clips of a run: the same on all its processes, with the list of those that cannot be read.

{run}/unreadable-0000.txt, ...      a file for each process: clips that could not be read, each with the reason
{run}/clip_timeouts-0000.jsonl, ...  see `clips.timeouts`
"""

import logging
import pickle
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.data import Dataset

from cogvideox_sat.clips.attempts import noting_late, refusing
from cogvideox_sat.clips.timeouts import BEFORE_TRAINING, ClipTimeouts, TimedOutClip, left_out, read_record, record_file
from cogvideox_sat.parallel import process_watch
from cogvideox_sat.parallel.agreement import from_first_process, meet
from sgm.errors import UserError


def open_clips(
    folder: Path, data: str, make: Callable[[], Dataset], repeats: bool = False
) -> tuple[Dataset, ClipTimeouts]:
    """Return the dataset that `make` returns on the first process, on all of them, and the record of its clips that
    took too long. Clips that took too long to look at, now or before the run was resumed, are left out of it.

    Args:
        folder: of the run.
        data: the argument that names it, for the record.
        repeats: see `ClipTimeouts`.

    Raises:
        UserError: from `make`, or the record cannot be read.
    """
    known = from_first_process(lambda: read_record(folder), "the record of slow clips")
    refused = {entry.clip: entry.reason for entry in known if entry.data == data and entry.step == BEFORE_TRAINING}
    timeouts = ClipTimeouts(data, record_file(folder, dist.get_rank()), known, repeats)

    def opened() -> Dataset:
        with refusing(refused), noting_late() as late:
            dataset = make()
        timeouts.record(left_out(late, data))
        return dataset

    dataset = same_dataset(opened, f"the clips of {data}")
    timeouts.learn(share_timeouts(timeouts.take_news(), f"the clips of {data}"))
    return dataset, timeouts


def same_dataset(make: Callable[[], Dataset], what: str) -> Dataset:
    """Return the dataset that `make` returns on the first process, on all of them: looked at at different times, or
    from different machines, it might not be the same. One that cannot be sent is made by each process.

    Args:
        what: the other processes wait for.

    Raises:
        UserError: from `make`.
    """
    made: list[Dataset] = []

    def packed() -> bytes:
        with process_watch.phase(f"looking at {what}"):
            made.append(make())
        try:
            return pickle.dumps(made[0]) if dist.get_world_size() > 1 else b""
        except (pickle.PicklingError, TypeError, AttributeError):  # of a class of the user's own
            return b""

    content = from_first_process(packed, what)
    if made:
        return made[0]
    return pickle.loads(content) if content else make()


def share_timeouts(news: list[TimedOutClip], what: str) -> list[TimedOutClip]:
    """Return the `news` of all processes, once all have come here; none where no process has any.

    Args:
        what: the processes wait for.
    """
    if not meet(what, len(news)) or dist.get_world_size() == 1:
        return []
    everything: list[list[TimedOutClip]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everything, news)
    return list(chain.from_iterable(everything))


class UnreadableClips:
    """The clips of a run that cannot be read: those that were left out of the data, and those that this process found
    while training, of which others took the place.

    Args:
        folder: of the run.
        dataset: with `unreadable`, the clips that were left out.
        max_share: of all clips, above which the run ends.
        log: where to tell of new ones.
    """

    def __init__(self, folder: Path, dataset: Any, max_share: float, log: logging.Logger):
        self.folder, self.max_share, self.log = folder, max_share, log
        self.left_out = list(getattr(dataset, "unreadable", ()))
        self.clips = len(dataset) + len(self.left_out)
        self.file = folder / f"unreadable-{dist.get_rank():04d}.txt"
        self.listed: set[str] = set()
        if self.file.exists():
            try:  # lines that were damaged are no clip's, and cost no more than a clip that is listed twice
                self.listed.update(self.file.read_text(encoding="utf-8", errors="replace").splitlines())
            except OSError as error:
                raise UserError(f"cannot read {self.file}: {error.strerror or error}; delete it") from error
        if dist.get_rank() == 0:
            self._list(self.left_out)

    def add(self, clips: Iterable[str]) -> None:
        """List clips that could not be read, of which others took the place."""
        for clip in self._list(clips):
            self.log.warning("unreadable, another clip takes its place: %s", clip)

    def _list(self, clips: Iterable[str]) -> list[str]:
        new = [clip for clip in dict.fromkeys(clips) if clip not in self.listed]
        if new:
            self.listed.update(new)
            try:
                with self.file.open("a", encoding="utf-8") as file:
                    file.writelines(f"{clip}\n" for clip in new)
            except OSError as error:
                raise UserError(f"cannot write {self.file}: {error.strerror or error}") from error
        return new

    @property
    def found(self) -> int:
        """Return how many unreadable clips this process found while training."""
        return len(self.listed - set(self.left_out))

    def check(self, found: int) -> int:
        """Return the number of unreadable clips, of which `found` turned up in training, on any process.

        Raises:
            UserError: the unreadable clips are too many.
        """
        unreadable = len(self.left_out) + found
        if unreadable > self.max_share * self.clips:
            raise UserError(
                f"{unreadable} of {self.clips} clips are unreadable, more than max_unreadable_share "
                f"{self.max_share:g} allows: {self.folder}/unreadable-*.txt lists them"
            )
        return unreadable


def describe_data(dataset: Dataset, samples: int) -> str:
    """Return what there is to train on, and how often a run that takes so many `samples` goes through it."""
    buckets = Counter(dataset.bucket(index) for index in range(len(dataset)))
    shapes = [f"{count} of {bucket}" for bucket, count in buckets.most_common(5)]
    more = [f"{len(buckets) - 5} more shapes"] if len(buckets) > 5 else []
    passes = samples / len(dataset)
    return f"{len(dataset)} clips, {passes:.1f} passes over them: {', '.join([*shapes, *more])}"
