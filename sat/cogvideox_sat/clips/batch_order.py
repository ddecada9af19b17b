"""Choose the samples of each batch, in an order that can be resumed at any position.

The order is the same for every number of processes.
"""

import logging
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cogvideox_sat.latent_geometry import Bucket
from sgm.errors import UserError
from sgm.seeds import hashed_seed, sample_seed

logger = logging.getLogger(__name__)


class SampleKey(NamedTuple):
    """Key of a sample in a dataset: index, seed of all its random numbers, and epoch (from 0)."""

    index: int  # type: ignore[assignment]  # tuples have a method of this name, which is not used here
    seed: int
    epoch: int = 0


class Locality(NamedTuple):
    """Positions of samples in few large files, which are read nearly in that order.

    Attributes:
        shards: for every sample the number of its file.
        window: the largest number of positions by which a sample is moved when it is shuffled; files are shuffled
            first.
    """

    shards: Sequence[int]
    window: int


class BatchOrder:
    """Endless micro-batches of one data-parallel rank, as lists of `SampleKey`.

    This is a batch sampler for a `DataLoader`.

    All samples of an epoch are put in a random order that follows from the seed. Going along this order,
    `micro_batch_size * world_size` samples of one bucket make a group as soon as they are found: one micro-step of all
    ranks, of which rank r takes the r-th share. So all ranks work on the same shape at a time, and two ranks with micro
    batches of one see together the samples that one rank with a micro batch of two sees. Samples that fill no group at
    the end of an epoch are left out of that epoch; they are other samples each time.

    A second `iter` starts where the first one did. To continue from a position, make another `BatchOrder` from its
    `state`. The sizes may then differ; the samples of the epoch that have not been seen follow.

    Args:
        buckets: the bucket of every sample.
        seed: seed of the order and of the samples; the seed in `state` takes precedence.
        shuffle: False: samples come in the order of their indices.
        state: a position, as `state` returns it. If the dataset has changed since, the next epoch begins, with a
            warning.
        locality: if given, samples that are close to each other on disk stay close to each other.
        draws: how often each sample is drawn in an epoch, on average; None: once. A sample that is drawn twice has a
            different seed each time. Fractions are decided by chance in each epoch.

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
        draws: Sequence[float] | None = None,
    ):
        kinds = sorted(set(buckets))
        number = {bucket: i for i, bucket in enumerate(kinds)}
        self.kinds = np.array([number[bucket] for bucket in buckets], np.int64)
        self.micro_batch_size, self.rank = micro_batch_size, rank
        self.group_size = micro_batch_size * world_size
        self.seed, self.shuffle, self.locality = seed, shuffle, locality
        self.samples = len(buckets)
        self.draws = None if draws is None else np.array(draws, np.float64)
        # A hash of everything that determines the order, except the seed and the sizes.
        basis = (kinds, self.kinds.tolist(), shuffle, locality, *(() if draws is None else (list(draws),)))
        self.fingerprint = zlib.crc32(repr(basis).encode())
        self._groups_by_epoch: dict[int, int] = {}
        self.epoch = 0
        self.phases: list[tuple[int, int]] = []
        self._check_sizes(kinds, micro_batch_size, world_size)
        if state is not None:
            self._go_to(state)

    def _check_sizes(self, kinds: Sequence[Bucket], micro_batch_size: int, world_size: int) -> None:
        counts: Mapping[int, float] = Counter(self.kinds.tolist())
        if self.draws is not None:
            counts = dict(enumerate(np.floor(np.bincount(self.kinds, self.draws, len(kinds)) + 1e-6).astype(int)))
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
            "the dataset or its buckets changed (%d clips, before %d): epoch %d begins with the present clips",
            *(self.samples, state["samples"], state["epoch"] + 1),
        )
        self.epoch += 1

    @property
    def epoch_size(self) -> int:
        """Return the samples of the first epoch over all ranks; without `draws`, of every epoch."""
        return self._groups_of(0) * self.group_size

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, remaining = self.epoch, self._remaining()
        share = slice(self.rank * self.micro_batch_size, (self.rank + 1) * self.micro_batch_size)
        while True:
            for group in self._groups(remaining, self.group_size):
                # The seed of a second draw is that of an imaginary sample after the last one: index + samples.
                yield [
                    SampleKey(drawn % self.samples, sample_seed(self.seed, epoch, drawn), epoch)
                    for drawn in group[share]
                ]
            epoch += 1
            remaining = self._permutation(epoch)

    def state(self, consumed: int) -> dict[str, Any]:
        """Return the position after `consumed` micro-batches, which is the same on all ranks.

        It consists of numbers, texts and lists, so that it can be written as JSON.
        """
        epoch, phases = self.epoch, list(self.phases)
        left = self._groups_in(self._remaining())
        if consumed >= left:
            epoch, phases, consumed = epoch + 1, [], consumed - left
            if self.draws is None:
                epochs, consumed = divmod(consumed, self._groups_of(0))
                epoch += epochs
            else:
                while consumed >= self._groups_of(epoch):
                    consumed -= self._groups_of(epoch)
                    epoch += 1
        if consumed and phases and phases[-1][0] == self.group_size:
            consumed += phases.pop()[1]
        if consumed:
            phases.append((self.group_size, consumed))
        return {
            "seed": self.seed,
            "epoch": epoch,
            "phases": [list(phase) for phase in phases],  # (group size, groups taken) in order
            "samples": self.samples,
            "fingerprint": self.fingerprint,
        }

    # -----------------------------------------------------------------------------------------------------------------

    def _permutation(self, epoch: int) -> np.ndarray:
        """Return the order of all samples in an epoch; the second draw of i is i + samples."""
        order = self._drawn(epoch)
        if not self.shuffle:
            return order
        chance = self._chance("order", epoch)
        if self.locality is None:
            return order[np.argsort(chance.random_sample(len(order)), kind="stable")]
        shards = np.asarray(self.locality.shards)[order % self.samples]
        places = np.argsort(chance.random_sample(max(self.locality.shards) + 1), kind="stable")
        order = order[np.argsort(places[shards], kind="stable")]
        jittered = np.arange(len(order)) + self.locality.window * chance.random_sample(len(order))
        return order[np.argsort(jittered, kind="stable")]

    def _drawn(self, epoch: int) -> np.ndarray:
        """Return all draws of an epoch, in the order of the samples' indices."""
        if self.draws is None:
            return np.arange(self.samples)
        times = np.floor(self.draws).astype(np.int64)
        # Samples with the same rate are shuffled, and every n-th gets one draw more, so that their sum is exact.
        chance = self._chance("draws", epoch)
        blocks = np.cumsum(np.diff(self.draws, prepend=self.draws[:1]) != 0)
        mixed = np.lexsort((chance.random_sample(self.samples), blocks))
        rest = np.floor(np.cumsum((self.draws - times)[mixed]) + chance.random_sample())
        times[mixed] += np.diff(rest, prepend=0).astype(np.int64)
        indices = np.repeat(np.arange(self.samples), times)
        turns = np.arange(len(indices)) - np.repeat(np.cumsum(times) - times, times)
        return indices + turns * self.samples

    def _chance(self, what: str, epoch: int) -> np.random.RandomState:
        """Return random numbers for one use.

        NumPy guarantees that the streams of RandomState never change, so a run may be resumed with another version.
        """
        seed = hashed_seed(self.seed, what, epoch)
        return np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32])

    def _remaining(self) -> np.ndarray:
        """Return the samples of the first epoch that have not been seen, in its order."""
        remaining = self._permutation(self.epoch)
        for size, taken in self.phases:
            groups = self._groups(remaining, size)
            seen = [index for _, group in zip(range(taken), groups, strict=False) for index in group]
            remaining = remaining[~np.isin(remaining, seen)]
        return remaining

    def _groups(self, order: np.ndarray, size: int) -> Iterator[list[int]]:
        """Yield groups of `size` samples of one bucket, in the order in which they are complete."""
        waiting: dict[int, list[int]] = {}
        for index, kind in zip(order.tolist(), self.kinds[order % self.samples].tolist(), strict=True):
            group = waiting.setdefault(kind, [])
            group.append(index)
            if len(group) == size:
                yield waiting.pop(kind)

    def _groups_in(self, samples: np.ndarray) -> int:
        return int((np.bincount(self.kinds[samples % self.samples]) // self.group_size).sum())

    def _groups_of(self, epoch: int) -> int:
        """Return the number of groups of a whole epoch; without `draws`, of every epoch."""
        if self.draws is None:
            return self._groups_in(np.arange(self.samples))
        if epoch not in self._groups_by_epoch:
            self._groups_by_epoch[epoch] = self._groups_in(self._drawn(epoch))
        return self._groups_by_epoch[epoch]
