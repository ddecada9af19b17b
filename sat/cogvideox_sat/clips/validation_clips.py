"""Load the clips of evaluations during training, the same ones each time.

They do not depend on the number of processes.
"""

import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from torch.utils.data import Dataset

from cogvideox_sat.clips.attempts import CLIP_TIMEOUT
from cogvideox_sat.clips.batch_order import SampleKey
from cogvideox_sat.clips.loader import ClipLoader, Share
from cogvideox_sat.clips.timeouts import ClipTimeouts
from cogvideox_sat.latent_geometry import Bucket
from sgm.seeds import hashed_seed

logger = logging.getLogger(__name__)


def validation_key(seed: int, index: int) -> SampleKey:
    """Return the key of validation clip `index` in every evaluation of runs with this seed."""
    return SampleKey(index, hashed_seed(seed, "validation", index))


def plan_batches(
    buckets: Sequence[Bucket], batch_size: int, seed: int, rank: int = 0, world_size: int = 1
) -> list[tuple[list[SampleKey], int]]:
    """Return the batches of one data-parallel rank, each with its weight in the mean.

    All ranks get the same number, since the network may be spread over them and then runs on all or none. If the
    batches do not divide evenly, some are repeated with weight 0.

    Args:
        buckets: the shapes of the clips; a batch holds clips of one shape, and the last of a shape may be smaller.
    """
    of_shape: dict[Bucket, list[int]] = {}
    for index, bucket in enumerate(buckets):
        of_shape.setdefault(bucket, []).append(index)
    batches = [
        [validation_key(seed, index) for index in indices[first : first + batch_size]]
        for indices in of_shape.values()
        for first in range(0, len(indices), batch_size)
    ]
    own = range(rank, -(-len(batches) // world_size) * world_size, world_size)
    return [(batches[i % len(batches)], len(batches[i % len(batches)]) if i < len(batches) else 0) for i in own]


class ValidationLoader:
    """Iterable of (batch, weight) over the first `batches * batch_size` clips of a dataset.

    The clips are the same in each pass. Their number is that over all ranks, so that the loss does not depend on the
    number of ranks.

    Args:
        dataset: as `data_video` makes it; with `random_start=False` clips do not depend on the seed either.
        num_workers: processes that read ahead; they are kept between passes.
        clip_timeout, timeouts, share: see `clips.loader.ClipLoader`.

    Attributes:
        step: step of the run at which the clips are read.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batches: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        clip_timeout: float = CLIP_TIMEOUT,
        timeouts: ClipTimeouts | None = None,
        share: Share | None = None,
    ):
        self.step = 0
        buckets = [dataset.bucket(index) for index in range(min(batches * batch_size, len(dataset)))]
        plan = plan_batches(buckets, batch_size, seed, rank, world_size)
        self.weights = [weight for _, weight in plan]
        keys = [keys for keys, _ in plan]
        self._loader = ClipLoader(
            dataset, keys, num_workers, clip_timeout, timeouts, step_of=lambda _: self.step, share=share
        )

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[tuple[dict[str, Any], int]]:
        for batch, weight in zip(self._loader, self.weights, strict=True):
            for path in chain.from_iterable(batch["unreadable"]):
                logger.warning("validation: another clip replaces one that is unreadable: %s", path)
            yield batch, weight
