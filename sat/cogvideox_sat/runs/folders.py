"""The folders of training runs: making the one of a new run, and finding the one to go on with.

Nothing here imports PyTorch.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from cogvideox_sat.configuration.argument_schema import RunArguments
from cogvideox_sat.files.atomic import replaced_when_complete, reported_as_user_error
from sgm.errors import UserError

logger = logging.getLogger("train_video")


def new_run_folder(args: RunArguments, now: datetime) -> Path:
    """Make the folder `{save}/{experiment_name}-MM-DD-HH-MM` of a new run, or with -2, -3, ... if that is taken.

    One process does this and tells the others.

    Raises:
        UserError: it cannot be made.
    """
    stem = Path(args.save) / f"{args.experiment_name}-{now:%m-%d-%H-%M}"
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


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `training_config.yaml` in a run's folder, in place of what lies or is linked there.

    Raises:
        UserError: it cannot be written.
    """
    path = folder / "training_config.yaml"
    with replaced_when_complete(path) as part, reported_as_user_error(path):
        part.write_text(yaml.safe_dump(config, sort_keys=False))


def find_resume(args: RunArguments, locate: Callable[[Path], Path]) -> Path | None:
    """The checkpoint that `resume` means; None for a new run.

    `latest` is the run of this `experiment_name` that saved last; when there is none yet a new one starts, so that a
    command that is started again and again needs no change. A path names a run, or one of its checkpoints.

    Args:
        locate: the checkpoint that such a path means; raises UserError if there is none.
    """
    if args.resume is None:
        return None
    if args.resume != "latest":
        return locate(Path(args.resume))
    runs = runs_of(args)
    if not runs:
        logger.warning(
            "resume: no run '%s' has saved anything in %s yet: starting a new one", args.experiment_name, args.save
        )
        return None
    return locate(max(runs, key=lambda run: (run / "latest").stat().st_mtime_ns))


def runs_of(args: RunArguments) -> list[Path]:
    """The folders of all runs of this `experiment_name` that have saved something."""
    name = re.compile(re.escape(args.experiment_name) + r"-\d\d-\d\d-\d\d-\d\d(-\d+)?")
    save = Path(args.save)
    runs = save.iterdir() if save.is_dir() else ()
    return [run for run in runs if name.fullmatch(run.name) and (run / "latest").is_file()]


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Leave no empty folder behind when the block fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it is not empty, or another process was faster
            folder.rmdir()
        raise
