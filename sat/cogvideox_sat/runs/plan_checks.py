"""Checks of both trainers before PyTorch is imported: locations of data, and resuming.

This module imports no PyTorch.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cogvideox_sat.commands.input_paths import not_found
from cogvideox_sat.configuration.determinism import describe_change
from cogvideox_sat.configuration.settings import LoopSettings
from cogvideox_sat.configuration.shared_arguments import RunArguments
from cogvideox_sat.runs.folders import check_unclaimed, find_resume
from sgm.errors import UserError


def check_places(args: RunArguments, kinds: str) -> None:
    """Check that training data is given, and that all locations of data exist.

    Args:
        kinds: possible values of `train_data`, in words.

    Raises:
        UserError: no training data is given, or a location does not exist.
    """
    if not any(args.train_data):
        raise UserError(f"train_data: missing; name {kinds}")
    for name, paths in (("train_data", args.train_data), ("valid_data", args.valid_data)):
        for path in paths:
            is_pattern = path.endswith(".tar") and any(char in path for char in "{*?[")
            if not path or not (is_pattern or "://" in path or os.path.exists(path)):  # noqa: PTH110
                raise UserError(not_found(name, path))


def clip_sizes(params: Mapping[str, Any]) -> Iterator[Sequence[int]]:
    """Yield each (height, width) in pixels in a `data:` section.

    Nothing is yielded if the section leaves the size to its class.

    Raises:
        UserError: a size is invalid.
    """
    sizes = params.get("video_size", params.get("image_size"))
    for size in () if sizes is None else sizes if _is_list_of_sizes(sizes) else (sizes,):
        if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
            raise UserError(f"data.params.video_size: got {size!r}; expected [height, width] in pixels")
        yield size


def _is_list_of_sizes(sizes: Any) -> bool:
    return isinstance(sizes, list) and bool(sizes) and isinstance(sizes[0], list)


def plan_resume(
    args: RunArguments,
    locate: Callable[[Path], Path],
    step_of: Callable[[Path], int | None],
    run_of: Callable[[Path], Path],
    log: logging.Logger,
) -> tuple[Path | None, bool]:
    """Return the checkpoint that `resume` names, and whether its run is complete.

    The checkpoint is None for a new run.

    Args:
        locate: returns the checkpoint for a path; raises UserError if none exists.
        step_of: returns the step in a checkpoint's name; None: the name has no step.
        run_of: returns the folder of a checkpoint's run.

    Raises:
        UserError: the checkpoint does not exist, a run that is named by its path is complete, or another process trains
            in the folder of the run.
    """
    checkpoint = find_resume(LoopSettings.from_args(args), locate)
    if checkpoint is None:
        return None, False
    step = step_of(checkpoint)
    complete = step is not None and step >= args.train_iters
    if complete and args.resume != "latest":  # `latest` is for commands that are started again until all is done
        raise UserError(f"resume: {checkpoint} is at step {step} of {args.train_iters}; raise train_iters to continue")
    if complete:
        return checkpoint, True
    run = run_of(checkpoint)
    if os.environ.get("RANK", "0") == "0":  # one process looks, since any that looks holds the lock for a moment
        check_unclaimed(run)
    if change := describe_change(run, args.deterministic):
        log.warning("%s", change)
    return checkpoint, False
