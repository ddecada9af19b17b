"""Batches of clips, read ahead by worker processes.

loader = make_loader(dataset, order, num_workers=2)
for batch in loader: ...
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from batch_order import SampleKey
from sgm.errors import UserError


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch: tensors stacked, everything else in lists."""
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {name: torch.stack(each) if torch.is_tensor(each[0]) else each for name, each in columns.items()}


def make_loader(dataset: Dataset, order: Iterable[list[SampleKey]], num_workers: int) -> "ClipLoader":
    """The batches of `order`, read ahead by `num_workers` processes (0: read when asked for, in this one)."""
    return ClipLoader(dataset, order, num_workers)


class ClipLoader:
    """Iterates over batches, see `make_loader`; each `iter` goes through `order` from its beginning.

    Raises:
        UserError: data cannot be read, or a worker process died.
    """

    def __init__(self, dataset: Dataset, order: Iterable[list[SampleKey]], num_workers: int):
        self._batches = DataLoader(
            _ErrorsAsItems(dataset),
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=_collate_unless_error,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            worker_init_fn=_leave_process_group,
            generator=torch.Generator(),  # it seeds the workers, which draw nothing; the global one is to stay as it is
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            for batch in self._batches:
                if isinstance(batch, UserError):
                    # Not `batch` itself: this frame and its traceback would keep each other, and the workers, alive.
                    raise UserError(*batch.args)
                yield batch
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise UserError(
                f"a process that reads data died ({str(error).strip().splitlines()[0]}), most likely for lack of "
                "memory or of shared memory (/dev/shm); lower num_workers"
            ) from error


class _ErrorsAsItems(Dataset):
    """A dataset that returns UserErrors: raised in a worker they would arrive wrapped in its traceback."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: SampleKey) -> dict[str, Any] | UserError:
        try:
            return self.dataset[key]
        except UserError as error:
            return error


def _collate_unless_error(samples: Sequence[dict[str, Any] | UserError]) -> dict[str, Any] | UserError:
    return next((sample for sample in samples if isinstance(sample, UserError)), None) or collate(samples)


def _leave_process_group(_: int) -> None:
    """The trainer ends its step and saves when it is told to stop, and needs its data until then.

    Ctrl-C and torchrun signal the whole process group, so workers make one of their own. They end when the trainer
    does, however it ends.
    """
    os.setpgid(0, 0)
