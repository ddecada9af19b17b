"""The folders of training runs: create a new one, or find the one to resume.

This module imports no PyTorch.
"""

import fcntl
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import yaml

from cogvideox_sat.clips.reader_record import with_backend
from cogvideox_sat.configuration.settings import LoopSettings
from cogvideox_sat.files.atomic import reported_as_user_error, write_atomically
from cogvideox_sat.files.refusals import refusal
from cogvideox_sat.runs.metrics import MetricsWriter
from cogvideox_sat.runs.retention import LATEST
from sgm.errors import UserError

logger = logging.getLogger(__name__)

CONFIG_FILE = "training_config.yaml"
LOCK_FILE = ".lock"  # nothing else opens it: a process loses its lock when it closes any descriptor of the file


def new_run_folder(settings: LoopSettings, now: datetime) -> Path:
    """Create the folder `{save}/{experiment_name}-MM-DD-HH-MM` of a new run.

    If it exists, -2, -3, ... is appended. One process does this and tells the others.

    Raises:
        UserError: the folder cannot be created.
    """
    stem = Path(settings.save) / f"{settings.experiment_name}-{now:%m-%d-%H-%M}"
    folder, number = stem, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = stem.with_name(f"{stem.name}-{number}")
        except OSError as error:
            raise UserError(f"cannot make {folder}: {refusal(error)}") from error


def open_run_folder(folder: Path, settings: LoopSettings, reader: Mapping[str, str] | None, step: int) -> MetricsWriter:
    """Write the configuration of a run that begins or resumes; return its metrics writer.

    One process does this. As long as the process and the writer exist, no other process can open the folder.

    Args:
        reader: decoder of the videos, to be recorded; None: no videos.
        step: steps done before.

    Raises:
        UserError: a file cannot be written, or another process has opened the folder.
    """
    with reported_as_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
    held = claim(folder)
    config = with_backend(settings.merged_config, reader)
    write_config(folder, config)
    writer = MetricsWriter(
        folder,
        tensorboard=settings.tensorboard,
        wandb=settings.wandb,
        wandb_project=settings.wandb_project,
        name=folder.name,
        config=config,
        start_step=step,
    )
    writer.held = held
    return writer


def claim(folder: Path) -> IO[bytes] | None:
    """Return the lock file of a run's folder, opened and locked; None if locks do not work.

    No other process can claim the folder until the file is closed or the process ends. The lock belongs to the process
    alone: forked processes that read clips, and may outlive it, do not hold it.

    Raises:
        UserError: another process has claimed it.
    """
    try:
        file = (folder / LOCK_FILE).open("ab")
    except OSError:  # the folder cannot be written to: the first file of the run reports it
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise UserError(
            f"resume: another process already continues {folder}; wait until it has ended, or stop it"
        ) from error
    except OSError:  # a file system without locks
        file.close()
        return None
    return file


def check_unclaimed(folder: Path) -> None:
    """Check that no other process trains in a run's folder, else raise UserError."""
    if (folder / LOCK_FILE).exists() and (file := claim(folder)):
        file.close()


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `training_config.yaml` in a run's folder, in place of an existing file or link.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomically(folder / CONFIG_FILE, yaml.safe_dump(config, sort_keys=False))


def find_resume(settings: LoopSettings, locate: Callable[[Path], Path]) -> Path | None:
    """Return the checkpoint that `resume` names; None for a new run.

    `latest` is the run of this `experiment_name` that saved last. If none exists, a new run starts, so that the same
    command can be started again and again. A path names a run or one of its checkpoints.

    Args:
        locate: returns the checkpoint for a path; raises UserError if none exists.
    """
    if settings.resume is None:
        return None
    if settings.resume != "latest":
        return locate(Path(settings.resume))
    runs = runs_of(settings)
    if not runs:
        logger.warning(
            "resume: no run '%s' has saved anything in %s yet; starting a new run",
            settings.experiment_name,
            settings.save,
        )
        return None
    return locate(max(runs, key=lambda run: (run / LATEST).stat().st_mtime_ns))


def runs_of(settings: LoopSettings) -> list[Path]:
    """Return the folders of all runs of this `experiment_name` that have saved something."""
    name = re.compile(re.escape(settings.experiment_name) + r"-\d\d-\d\d-\d\d-\d\d(-\d+)?")
    save = Path(settings.save)
    runs = save.iterdir() if save.is_dir() else ()
    return [run for run in runs if name.fullmatch(run.name) and (run / LATEST).is_file()]


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove the folder if the block fails and the folder holds at most its lock file."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the folder is not empty, or another process has removed it
            if [path.name for path in folder.iterdir()] == [LOCK_FILE]:
                (folder / LOCK_FILE).unlink()
            folder.rmdir()
        raise
