"""Keep and delete checkpoints of a run, and mark the newest one, without PyTorch."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from cogvideox_sat.files.atomic import write_atomically

LATEST = "latest"


def mark_newest(run_folder: Path, name: str) -> None:
    """Write `latest` with the name of the newest checkpoint, which must be complete.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomically(run_folder / LATEST, name)


def last_saved(run_folder: Path) -> Path | None:
    """Return the folder of a run if it has a checkpoint to resume from, else None."""
    return run_folder if (run_folder / LATEST).exists() else None


def outdated(steps: Iterable[int], newest: int, keep_last: int | None) -> list[int]:
    """Return the steps whose checkpoints should be deleted.

    All but the last `keep_last` up to `newest` are deleted. Steps after `newest` were abandoned when the run was
    resumed from an earlier step, and are deleted too.

    Args:
        steps: steps that have checkpoints.
        keep_last: None: keep all.
    """
    if keep_last is None:
        return []
    ascending = sorted(steps)
    until = [step for step in ascending if step <= newest]
    kept = until[max(len(until) - keep_last, 0) :]
    return [step for step in ascending if step not in kept]


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left in a folder while writing or deleting."""
    for part in folder.glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
