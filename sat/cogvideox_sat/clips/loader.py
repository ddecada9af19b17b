"""Load batches of clips in a fixed order, read ahead by processes.

A process is replaced if a clip takes too long.

    loader = ClipLoader(dataset, order, num_workers=2, clip_timeout=120)
    for batch in loader: ...
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import Dataset

from cogvideox_sat.clips.attempts import CLIP_TIMEOUT, reading
from cogvideox_sat.clips.batch_order import SampleKey
from cogvideox_sat.clips.reading_outcomes import Done, Failed, Stuck
from cogvideox_sat.clips.reading_processes import ReadingProcesses
from cogvideox_sat.clips.timeouts import ClipTimeouts, TimedOutClip
from cogvideox_sat.parallel import process_watch
from cogvideox_sat.parallel.process_watch import Reading
from sgm.errors import UserError

BATCHES_AHEAD = 2  # for each worker
Share = Callable[[list[TimedOutClip], str], list[TimedOutClip]]


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a batch: tensors are stacked, other values are put in lists."""
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {name: _stacked(each) if torch.is_tensor(each[0]) else each for name, each in columns.items()}


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tuple(tensors))  # a single tensor needs no copy


class ClipLoader:
    """Iterable of batches; each `iter` goes through `order` from its beginning.

    A clip that is not read in time counts as unreadable: the process that reads it is killed and replaced, and the
    sample becomes the one that the dataset gives in place of an unreadable clip.

    Args:
        dataset: gives samples for `SampleKey`s, and reads each clip inside `clips.attempts.attempt`.
        order: the samples of each batch.
        num_workers: processes that read, two batches ahead each. 0: one process, which reads one batch ahead, and
            decodes it on all cores.
        clip_timeout: seconds for a clip.
        timeouts: the record of clips that took too long.
        step_of: a function that returns the step that takes the batch of a number, counted from 0 in each pass. By
            default every batch is one step.
        share: for processes that work in step and have a loader each: a function of the new entries of the record and
            of the name of the data that is waited for, which returns the new entries of all processes once each has its
            batch.

    Raises:
        UserError: data cannot be read, or a worker process died.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Iterable[list[SampleKey]],
        num_workers: int,
        clip_timeout: float = CLIP_TIMEOUT,
        timeouts: ClipTimeouts | None = None,
        step_of: Callable[[int], int] | None = None,
        share: Share | None = None,
    ):
        self.dataset, self.order = dataset, order
        self.num_workers, self.clip_timeout = num_workers, clip_timeout
        self.timeouts = ClipTimeouts("train_data") if timeouts is None else timeouts
        self.step_of, self.share = step_of or (lambda number: number + 1), share
        self._processes: ReadingProcesses | None = None
        self._numbers = itertools.count()
        self._pinning = ThreadPoolExecutor(1) if torch.cuda.is_available() else None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Begin a pass; the processes begin to read immediately."""
        if self._processes is None:
            self._processes = ReadingProcesses(
                _BatchReader(self.dataset), max(self.num_workers, 1), self.clip_timeout, 1 if self.num_workers else 0
            )
        self._processes.withdraw()
        return _Pass(self, self._processes)

    def being_read(self) -> list[Reading]:
        """Return the reads that are going on; this may be called from any thread."""
        return self._processes.being_read() if self._processes else []


class _Pass(Iterator[dict[str, Any]]):
    """One pass through the batches of a loader."""

    def __init__(self, loader: ClipLoader, processes: ReadingProcesses):
        self.loader, self.processes = loader, processes
        self.order = enumerate(loader.order)
        self.ahead = BATCHES_AHEAD * loader.num_workers or 1
        self.queue: dict[int, tuple[list[SampleKey], int]] = {}  # keys and step of the next batches, by task
        self.finished: dict[int, Any] = {}
        self._fill()

    def __next__(self) -> dict[str, Any]:
        if not self.queue:
            raise StopIteration
        number, (_, step) = next(iter(self.queue.items()))
        loader, what = self.loader, f"the clips of step {step} ({self.loader.timeouts.data})"
        while True:
            with process_watch.phase(f"reading {what}", loader.being_read):
                while number not in self.finished or self._is_outdated(number):
                    for outcome in self.processes.collect():
                        self._take(outcome)
            # Processes that read the same clip must agree about it, so all of them know the same at each step.
            found = loader.share(loader.timeouts.take_news(), what) if loader.share else []
            if not found:
                break
            loader.timeouts.learn(found)
        batch, _ = self.finished.pop(number)
        del self.queue[number]
        self._fill()
        return batch.result() if self.loader._pinning else batch

    def _fill(self) -> None:
        """Submit batches until enough are read ahead, and take the finished ones."""
        while len(self.queue) < self.ahead and (item := next(self.order, None)) is not None:
            task = next(self.loader._numbers)
            self.queue[task] = (item[1], self.loader.step_of(item[0]))
            self._submit(task)
        for outcome in self.processes.collect(wait=False):
            self._take(outcome)

    def _submit(self, number: int, again: bool = False) -> None:
        keys, step = self.queue[number]
        self.processes.submit(number, [(key, self.loader.timeouts.refused(key, step)) for key in keys], first=again)

    def _take(self, outcome: Done | Failed | Stuck) -> None:
        if outcome.number not in self.queue:  # from an earlier pass
            return
        if isinstance(outcome, Failed):
            outcome.raise_here()
        elif isinstance(outcome, Stuck):
            keys, step = self.queue[outcome.number]
            self.loader.timeouts.note(keys[outcome.place], step, outcome.name, outcome.reason)
            self._submit(outcome.number, again=True)
        else:
            batch, attempted = outcome.result
            keys, step = self.queue[outcome.number]
            for key, clips in zip(keys, attempted, strict=True):
                self.loader.timeouts.settle(key, step, clips[-1])
            if self.loader._pinning:
                batch = self.loader._pinning.submit(_pinned, batch)
            self.finished[outcome.number] = batch, attempted

    def _is_outdated(self, number: int) -> bool:
        """Return whether a batch has a clip that its step must replace; it is then read again."""
        keys, step = self.queue[number]
        for key, clips in zip(keys, self.finished[number][1], strict=True):
            if not self.loader.timeouts.refused(key, step).keys().isdisjoint(clips):
                del self.finished[number]
                self._submit(number, again=True)
                return True
        return False


def _pinned(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.pin_memory() if torch.is_tensor(value) else value for name, value in batch.items()}


# ---------------------------------------------------------------- in the processes


class _BatchReader:
    """Reader of batches, which consist of samples and of the clips that each must not use."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __call__(self, task: Sequence[tuple[SampleKey, Mapping[str, str]]]) -> tuple[dict[str, Any], list[list[str]]]:
        """Return the batch, and for each sample the clips that were tried; the last one was used."""
        samples, attempted = [], []
        for place, (key, refused) in enumerate(task):
            sample, clips = self._sample(place, key, refused)
            samples.append(sample)
            attempted.append(clips)
        return collate(samples), attempted

    def _sample(self, place: int, key: SampleKey, refused: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
        unreadable = []
        for index in self._candidates(key.index):
            name = f"sample {index}"  # the name of a clip if the dataset gives none
            if name in refused:
                unreadable.append(f"{name}: {refused[name]}")
                continue
            with reading(place, name, refused) as clips:
                sample = self.dataset[key._replace(index=index)]
            if unreadable:
                sample = {**sample, "index": key.index, "unreadable": [*unreadable, *sample.get("unreadable", ())]}
            return sample, clips or [name]
        raise UserError(f"no sample is left to replace sample {key.index}: {'; '.join(unreadable[:5])}")

    def _candidates(self, index: int) -> Iterator[int]:
        """Yield the sample, then the samples that can replace it: the next ones of its shape."""
        yield index
        if bucket := getattr(self.dataset, "bucket", None):
            others = itertools.chain(range(index + 1, len(self.dataset)), range(index))
            yield from (other for other in others if bucket(other) == bucket(index))
