"""Which checkpoints of a run stay, and which one is the newest. Nothing here imports PyTorch."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from cogvideox_sat.files.atomic import replaced_when_complete

LATEST = "latest"


def mark_newest(run_folder: Path, name: str) -> None:
    """Write `latest`, which names the newest checkpoint of the run; it exists already, complete.

    Raises:
        UserError: the file cannot be written.
    """
    with replaced_when_complete(run_folder / LATEST) as file:
        file.write_text(name)


def last_saved(run_folder: Path) -> Path | None:
    """Return the folder of a run if there is a checkpoint in it to go on from."""
    return run_folder if (run_folder / LATEST).exists() else None


def outdated(steps: Iterable[int], newest: int, keep_last: int | None) -> list[int]:
    """Return the steps whose checkpoints are to be deleted: all but the last `keep_last` up to `newest`.

    Later ones are of a future that was given up when the run was resumed from an earlier step.

    Args:
        steps: those that there are checkpoints of.
        keep_last: None: all stay.
    """
    if keep_last is None:
        return []
    ascending = sorted(steps)
    until = [step for step in ascending if step <= newest]
    kept = until[max(len(until) - keep_last, 0) :]
    return [step for step in ascending if step not in kept]


def remove_unfinished(folder: Path) -> None:
    """Remove what a process that was killed had begun to write into a folder, or to delete from it."""
    for part in folder.glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
