"""Open the data of a run on this process, for both trainers."""

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
    """The clips of a step, and this process's share of them.

    Args:
        batch: clips per batch.
        accumulation: batches per step.
        rank, ranks: index and number of the processes, or groups of processes, that have their own clips.
    """

    batch: int
    accumulation: int
    rank: int
    ranks: int

    @property
    def clips(self) -> int:
        """Return the number of clips of a step, over all processes."""
        return self.batch * self.accumulation * self.ranks


@dataclass
class TrainingData:
    """The training data.

    Attributes:
        dataset: all clips, the same on all processes.
        unreadable: clips that cannot be read, known before or found while training.
        order: the order of this process's batches; its position is saved in checkpoints.
        loader: loads these batches.
    """

    dataset: Any
    unreadable: UnreadableClips
    order: BatchOrder
    loader: ClipLoader

    @property
    def reader(self) -> Mapping[str, str] | None:
        """Return the decoder of the videos, see `clips.reader_record`; None without videos."""
        return getattr(self.dataset, "reader", None)


@dataclass
class ValidationData:
    """The validation data; `loader` loads the batches of this process."""

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
    """Open `train_data` at its beginning, or at the position of the run's last checkpoint.

    Args:
        folder: folder of the run.
        train_iters: steps of the run, for logging the number of passes over the data.
        state: state of a checkpoint, with `step`, `data` and the reader's record.

    Raises:
        UserError: the data or its settings do not fit, too many clips are unreadable, or the state belongs to other
            data.
    """
    # UnreadableClips checks the share of unreadable clips, after listing them in the run's folder.
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
    """Open `valid_data`: the same clips at the same positions in every evaluation.

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
