"""The clips of a run: the same on all processes, with lists of unreadable ones.

{run}/unreadable-0000.txt, ...      one file per process: unreadable clips, each with the reason
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
from cogvideox_sat.files.refusals import refusal
from cogvideox_sat.parallel import process_watch
from cogvideox_sat.parallel.agreement import from_first_process, meet
from sgm.errors import UserError


def open_clips(
    folder: Path, data: str, make: Callable[[], Dataset], repeats: bool = False
) -> tuple[Dataset, ClipTimeouts]:
    """Return the first process's data set on all processes, and the record of slow clips.

    Clips that took too long to open, now or before the run was resumed, are left out of the data set.

    Args:
        folder: folder of the run.
        data: name of the argument for the data, for the record.
        repeats: see `ClipTimeouts`.

    Raises:
        UserError: `make` raised it, or the record cannot be read.
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
    """Return on all processes the data set that `make` returns on the first one.

    If it were read at different times, or from different machines, it might differ. A data set that cannot be sent is
    made by each process.

    Args:
        what: what the other processes wait for, for messages.

    Raises:
        UserError: `make` raised it.
    """
    made: list[Dataset] = []

    def packed() -> bytes:
        with process_watch.phase(f"looking at {what}"):
            made.append(make())
        try:
            return pickle.dumps(made[0]) if dist.get_world_size() > 1 else b""
        except (pickle.PicklingError, TypeError, AttributeError):  # a user's own class
            return b""

    content = from_first_process(packed, what)
    if made:
        return made[0]
    return pickle.loads(content) if content else make()


def share_timeouts(news: list[TimedOutClip], what: str) -> list[TimedOutClip]:
    """Return the `news` of all processes, after all of them have called this.

    Args:
        what: what the processes wait for, for messages.
    """
    if not meet(what, len(news)) or dist.get_world_size() == 1:
        return []
    everything: list[list[TimedOutClip]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everything, news)
    return list(chain.from_iterable(everything))


class UnreadableClips:
    """The unreadable clips of a run: left out of the data, or found while training.

    In training, other clips replace those that this process finds.

    Args:
        folder: folder of the run.
        dataset: data set with `unreadable`, the clips that were left out.
        max_share: largest share of unreadable clips; above it, the run ends.
        log: logger for newly found clips.
    """

    def __init__(self, folder: Path, dataset: Any, max_share: float, log: logging.Logger):
        self.folder, self.max_share, self.log = folder, max_share, log
        self.left_out = list(getattr(dataset, "unreadable", ()))
        self.clips = len(dataset) + len(self.left_out)
        self.file = folder / f"unreadable-{dist.get_rank():04d}.txt"
        self.listed: set[str] = set()
        if self.file.exists():
            try:  # a damaged line matches no clip, which only lists a clip twice
                self.listed.update(self.file.read_text(encoding="utf-8", errors="replace").splitlines())
            except OSError as error:
                raise UserError(f"cannot read {self.file}: {error.strerror or error}; delete it") from error
        if dist.get_rank() == 0:
            self._list(self.left_out)

    def add(self, clips: Iterable[str]) -> None:
        """List clips that could not be read and were replaced by others."""
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
                raise UserError(f"cannot write {self.file}: {refusal(error)}") from error
        return new

    @property
    def found(self) -> int:
        """Return how many unreadable clips this process found while training."""
        return len(self.listed - set(self.left_out))

    def check(self, found: int) -> int:
        """Return the number of unreadable clips.

        Args:
            found: number of clips found in training, over all processes.

        Raises:
            UserError: too many clips are unreadable.
        """
        unreadable = len(self.left_out) + found
        if unreadable > self.max_share * self.clips:
            raise UserError(
                f"{unreadable} of {self.clips} clips are unreadable, more than max_unreadable_share "
                f"{self.max_share:g} allows; {self.folder}/unreadable-*.txt lists them"
            )
        return unreadable


def describe_data(dataset: Dataset, samples: int) -> str:
    """Return a description of the data, and how often `samples` samples go through it."""
    buckets = Counter(dataset.bucket(index) for index in range(len(dataset)))
    shapes = [f"{count} of {bucket}" for bucket, count in buckets.most_common(5)]
    more = [f"{len(buckets) - 5} more shapes"] if len(buckets) > 5 else []
    passes = samples / len(dataset)
    return f"{len(dataset)} clips, {passes:.1f} passes over them: {', '.join([*shapes, *more])}"
