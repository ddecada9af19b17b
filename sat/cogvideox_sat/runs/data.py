"""The data of a run on this process: from the settings to batches in their order. Both trainers open theirs here."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogvideox_sat.clips.batch_order import BatchOrder
from cogvideox_sat.clips.loader import ClipLoader
from cogvideox_sat.clips.reader_record import warn_of_other_reader
from cogvideox_sat.clips.timeouts import ClipTimeouts
from cogvideox_sat.clips.validation_clips import ValidationLoader
from cogvideox_sat.configuration.settings import DataSettings
from cogvideox_sat.runs.clips import UnreadableClips, describe_data, open_clips, share_timeouts
from cogvideox_sat.runs.datasets import make_dataset


@dataclass(frozen=True)
class StepShare:
    """How many clips a step takes, and which of them are this process's.

    Args:
        batch: clips of a batch.
        accumulation: batches of a step.
        rank, ranks: of the processes, or groups of such, that have clips of their own.
    """

    batch: int
    accumulation: int
    rank: int
    ranks: int

    @property
    def clips(self) -> int:
        """Return the clips of a step, over all processes."""
        return self.batch * self.accumulation * self.ranks


@dataclass
class TrainingData:
    """What is trained on.

    Attributes:
        dataset: all clips, the same on all processes.
        unreadable: those of them that cannot be read, and those that turn out so.
        order: of the batches of this process; its position goes into checkpoints.
        loader: gives these batches.
    """

    dataset: Any
    unreadable: UnreadableClips
    order: BatchOrder
    loader: ClipLoader

    @property
    def reader(self) -> Mapping[str, str] | None:
        """Return what decodes the videos, see `clips.reader_record`; None for data without videos."""
        return getattr(self.dataset, "reader", None)


@dataclass
class ValidationData:
    """What evaluations look at; `loader` gives the batches of this process."""

    dataset: Any
    timeouts: ClipTimeouts
    loader: ValidationLoader


def open_training_data(
    folder: Path,
    settings: DataSettings,
    share: StepShare,
    train_iters: int,
    state: Mapping[str, Any] | None,
    log: logging.Logger,
) -> TrainingData:
    """Open `train_data` at its beginning, or where the run's last checkpoint was.

    Args:
        folder: of the run.
        train_iters: steps of the run, to say how often they go through the data.
        state: of a checkpoint, with `step`, `data` and the reader's record.

    Raises:
        UserError: the data or its settings do not fit, too many clips are unreadable, or the state is of other data.
    """
    # Whether too many clips are unreadable is decided by UnreadableClips, which lists them in the run's folder.
    lenient = replace(settings, max_unreadable_share=1.0)
    mixing: dict[str, Any] = {"repeats": settings.train_data_repeats, "weights": settings.train_data_weights}
    dataset, timeouts = open_clips(folder, "train_data", lambda: make_dataset(settings.train_data, lenient, **mixing))
    unreadable = UnreadableClips(folder, dataset, settings.max_unreadable_share, log)
    unreadable.check(0)
    if state:
        warn_of_other_reader("resume", state, getattr(dataset, "reader", None))
    log.info("train_data: %s", describe_data(dataset, train_iters * share.clips))
    order = BatchOrder(
        [dataset.bucket(index) for index in range(len(dataset))],
        share.batch,
        share.rank,
        share.ranks,
        settings.seed,
        state=state["data"] if state else None,
        locality=getattr(dataset, "locality", None),
        draws=getattr(dataset, "draws", None),
    )
    first = state["step"] + 1 if state else 1
    loader = ClipLoader(
        dataset,
        order,
        settings.num_workers,
        settings.clip_timeout,
        timeouts,
        step_of=lambda number: first + number // share.accumulation,
        share=share_timeouts,
    )
    return TrainingData(dataset, unreadable, order, loader)


def open_validation_data(folder: Path, settings: DataSettings, share: StepShare) -> ValidationData:
    """Open `valid_data`, the same clips at the same places at every evaluation.

    Raises:
        UserError: the data or its settings do not fit, or too many clips are unreadable.
    """
    dataset, timeouts = open_clips(
        folder,
        "valid_data",
        lambda: make_dataset(settings.valid_data, settings, random_start=False, argument="valid_data"),
        repeats=True,
    )
    loader = ValidationLoader(
        dataset,
        batches=settings.eval_iters,
        batch_size=settings.eval_batch_size,
        seed=settings.seed,
        rank=share.rank,
        world_size=share.ranks,
        num_workers=min(settings.num_workers, 1),
        clip_timeout=settings.clip_timeout,
        timeouts=timeouts,
        share=share_timeouts,
    )
    return ValidationData(dataset, timeouts, loader)
