"""Which samples make up each batch: the same order for every number of processes, and from any point in it again."""

import logging
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sgm.errors import UserError
from sgm.seeds import hashed_seed, sample_seed

logger = logging.getLogger("train_video")


class Bucket(NamedTuple):
    """The shape of a clip; a batch holds clips of one shape. Height and width are in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.height}x{self.width}"


class SampleKey(NamedTuple):
    """What a dataset is asked for: a sample, the seed of all its random numbers, and the epoch (from 0)."""

    index: int
    seed: int
    epoch: int = 0


class Locality(NamedTuple):
    """Samples that lie one after another in few large files, and are to be read nearly in that order.

    Args:
        shards: for every sample the number of the file that it lies in.
        window: how many places a sample moves at most when it is shuffled within the files' own shuffled order.
    """

    shards: Sequence[int]
    window: int


class BatchOrder:
    """Endless micro-batches of one data-parallel rank, as lists of `SampleKey`: a batch sampler for a `DataLoader`.

    All samples of an epoch are put in a random order that follows from the seed. Walking along it, whenever
    `micro_batch_size * world_size` samples of one bucket have come together they make a group: one micro-step of all
    ranks, of which rank r takes the r-th share. So the ranks always work on the same shape, and two ranks with micro
    batches of one see together what one rank with a micro batch of two sees. What is left of a bucket at the end of an
    epoch and fills no group is left out of that epoch; chance decides anew each time which samples these are.

    A second `iter` starts where the first did. To go on from a position make another `BatchOrder` from its `state`;
    the sizes may then differ, and what follows are the samples of the epoch that have not been seen yet.

    Args:
        buckets: the bucket of every sample.
        seed: of the order and of the samples; the one in `state` wins, since it is that order that goes on.
        shuffle: without it, samples come in the order of their indices.
        state: a position as `state` gives it. If the dataset has changed since, its next epoch begins, with a warning.
        locality: given, samples that lie close to each other on disk stay close to each other.

    Raises:
        UserError: no bucket has enough samples for one group.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool = True,
        state: Mapping[str, Any] | None = None,
        locality: Locality | None = None,
    ):
        kinds = sorted(set(buckets))
        number = {bucket: i for i, bucket in enumerate(kinds)}
        self.kinds = np.array([number[bucket] for bucket in buckets], np.int64)
        self.micro_batch_size, self.rank = micro_batch_size, rank
        self.group_size = micro_batch_size * world_size
        self.seed, self.shuffle, self.locality = seed, shuffle, locality
        self.samples = len(buckets)
        # Of all that the order follows from besides the seed and the sizes.
        self.fingerprint = zlib.crc32(repr((kinds, self.kinds.tolist(), shuffle, locality)).encode())
        self.epoch, self.phases = 0, []
        self._check_sizes(kinds, micro_batch_size, world_size)
        if state is not None:
            self._go_to(state)

    def _check_sizes(self, kinds: Sequence[Bucket], micro_batch_size: int, world_size: int) -> None:
        counts = Counter(self.kinds.tolist())
        needed = f"{self.group_size} ({micro_batch_size} on each of {world_size} data-parallel processes)"
        small = [f"{counts[i]} of {bucket}" for i, bucket in enumerate(kinds) if counts[i] < self.group_size]
        if len(small) == len(kinds):
            raise UserError(
                f"the dataset is smaller than one batch: a batch takes {needed} clips of one shape, and there are "
                f"{', '.join(small) or 'none'}; add clips, lower train_micro_batch_size_per_gpu or use fewer processes"
            )
        if small:
            logger.warning("never used, since a batch takes %s clips of one shape: %s", needed, ", ".join(small))

    def _go_to(self, state: Mapping[str, Any]) -> None:
        self.seed, self.epoch = state["seed"], state["epoch"]
        if state["fingerprint"] == self.fingerprint:
            self.phases = [tuple(phase) for phase in state["phases"]]
            return
        logger.warning(
            "the dataset or its buckets changed (%d clips, before %d): epoch %d begins with what there is now",
            *(self.samples, state["samples"], state["epoch"] + 1),
        )
        self.epoch += 1

    @property
    def epoch_size(self) -> int:
        """Samples of a whole epoch, over all ranks."""
        return self._groups_in(np.arange(self.samples)) * self.group_size

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, remaining = self.epoch, self._remaining()
        share = slice(self.rank * self.micro_batch_size, (self.rank + 1) * self.micro_batch_size)
        while True:
            for group in self._groups(remaining, self.group_size):
                yield [SampleKey(index, sample_seed(self.seed, epoch, index), epoch) for index in group[share]]
            epoch += 1
            remaining = self._permutation(epoch)

    def state(self, consumed: int) -> dict[str, Any]:
        """The position after this rank has taken `consumed` micro-batches since construction; the same on all ranks.

        It consists of numbers, text and lists, so that it can be written as JSON.
        """
        epoch, phases = self.epoch, list(self.phases)
        left = self._groups_in(self._remaining())
        if consumed >= left:
            epochs, consumed = divmod(consumed - left, self.epoch_size // self.group_size)
            epoch, phases = epoch + 1 + epochs, []
        if consumed and phases and phases[-1][0] == self.group_size:
            consumed += phases.pop()[1]
        if consumed:
            phases.append((self.group_size, consumed))
        return {
            "seed": self.seed,
            "epoch": epoch,
            "phases": [list(phase) for phase in phases],  # (group size, groups taken), one after another
            "samples": self.samples,
            "fingerprint": self.fingerprint,
        }

    # -----------------------------------------------------------------------------------------------------------------

    def _permutation(self, epoch: int) -> np.ndarray:
        """The order of all samples in an epoch."""
        order = np.arange(self.samples)
        if not self.shuffle:
            return order
        seed = hashed_seed(self.seed, "order", epoch)
        # RandomState, because NumPy promises that its streams never change: a run may be resumed with another version.
        chance = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32])
        if self.locality is None:
            return np.argsort(chance.random_sample(self.samples), kind="stable")
        shards = np.asarray(self.locality.shards)
        places = np.argsort(chance.random_sample(shards.max() + 1), kind="stable")
        order = order[np.argsort(places[shards], kind="stable")]
        jittered = np.arange(self.samples) + self.locality.window * chance.random_sample(self.samples)
        return order[np.argsort(jittered, kind="stable")]

    def _remaining(self) -> np.ndarray:
        """The samples of the first epoch that have not been seen, in its order."""
        remaining = self._permutation(self.epoch)
        for size, taken in self.phases:
            groups = self._groups(remaining, size)
            seen = [index for _, group in zip(range(taken), groups, strict=False) for index in group]
            remaining = remaining[~np.isin(remaining, seen)]
        return remaining

    def _groups(self, order: np.ndarray, size: int) -> Iterator[list[int]]:
        """Groups of `size` samples of one bucket, each as soon as it is complete when one walks along `order`."""
        waiting: dict[int, list[int]] = {}
        for index, kind in zip(order.tolist(), self.kinds[order].tolist(), strict=True):
            group = waiting.setdefault(kind, [])
            group.append(index)
            if len(group) == size:
                yield waiting.pop(kind)

    def _groups_in(self, samples: np.ndarray) -> int:
        return int((np.bincount(self.kinds[samples]) // self.group_size).sum())
