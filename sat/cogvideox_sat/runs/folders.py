"""The folders of training runs: making the one of a new run, and finding the one to go on with.

Nothing here imports PyTorch.
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
from cogvideox_sat.files.atomic import replaced_when_complete, reported_as_user_error
from cogvideox_sat.runs.metrics import MetricsWriter
from cogvideox_sat.runs.retention import LATEST
from sgm.errors import UserError

logger = logging.getLogger(__name__)

CONFIG_FILE = "training_config.yaml"


def new_run_folder(settings: LoopSettings, now: datetime) -> Path:
    """Make the folder `{save}/{experiment_name}-MM-DD-HH-MM` of a new run, or with -2, -3, ... if that is taken.

    One process does this and tells the others.

    Raises:
        UserError: it cannot be made.
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
            raise UserError(f"cannot make {folder}: {error.strerror}") from error


def open_run_folder(folder: Path, settings: LoopSettings, reader: Mapping[str, str] | None, step: int) -> MetricsWriter:
    """Write the configuration of a run that begins or goes on, and return the writer of its metrics.

    One process does this. As long as it and the writer live, no other process can open the folder.

    Args:
        reader: what decodes the videos, to be recorded; None: nothing does.
        step: steps done before.

    Raises:
        UserError: a file cannot be written, or another process has opened the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder)
    config = with_backend(settings.merged_config, reader)
    write_config(folder, config)
    held = claim(folder)
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
    """Return the configuration of a run as an open file that no other process can claim until it is closed, or the
    process ends; None where there is none, or the file system cannot do this.

    The lock is the operating system's own and belongs to the process alone: those that it forks to read clips, and that
    may outlive it, do not hold it.

    Raises:
        UserError: another process has claimed it.
    """
    try:
        file = (folder / CONFIG_FILE).open("r+b")
    except OSError:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise UserError(
            f"resume: another process goes on with {folder} already; wait until it has ended, or stop it"
        ) from error
    except OSError:
        file.close()
        return None
    return file


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `training_config.yaml` in a run's folder, in place of what lies or is linked there.

    Raises:
        UserError: it cannot be written.
    """
    path = folder / CONFIG_FILE
    with replaced_when_complete(path) as part, reported_as_user_error(path):
        part.write_text(yaml.safe_dump(config, sort_keys=False))


def find_resume(settings: LoopSettings, locate: Callable[[Path], Path]) -> Path | None:
    """Return the checkpoint that `resume` means; None for a new run.

    `latest` is the run of this `experiment_name` that saved last; when there is none yet a new one starts, so that a
    command that is started again and again needs no change. A path names a run, or one of its checkpoints.

    Args:
        locate: the checkpoint that such a path means; raises UserError if there is none.
    """
    if settings.resume is None:
        return None
    if settings.resume != "latest":
        return locate(Path(settings.resume))
    runs = runs_of(settings)
    if not runs:
        logger.warning(
            "resume: no run '%s' has saved anything in %s yet: starting a new one",
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
    """Leave no empty folder behind when the block fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it is not empty, or another process was faster
            folder.rmdir()
        raise
