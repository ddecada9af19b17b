"""What the plans of both trainers check before anything heavy is imported: places of data, and what to go on from.

Nothing here imports PyTorch.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cogvideox_sat.commands.input_paths import not_found
from cogvideox_sat.configuration.argument_schema import RunArguments
from cogvideox_sat.configuration.determinism import describe_change
from cogvideox_sat.configuration.settings import LoopSettings
from cogvideox_sat.runs.folders import find_resume
from sgm.errors import UserError


def check_places(args: RunArguments, kinds: str) -> None:
    """Check that there is training data, and that all places of data exist.

    Args:
        kinds: what `train_data` can be, in words.

    Raises:
        UserError: there is none, or a place does not exist.
    """
    if not any(args.train_data):
        raise UserError(f"train_data is missing: name {kinds}")
    for name, paths in (("train_data", args.train_data), ("valid_data", args.valid_data)):
        for path in paths:
            is_pattern = path.endswith(".tar") and any(char in path for char in "{*?[")
            if not path or not (is_pattern or "://" in path or Path(path).exists()):
                raise UserError(not_found(name, path))


def clip_sizes(params: Mapping[str, Any]) -> Iterator[Sequence[int]]:
    """Yield each (height, width) in pixels that a `data:` section asks for; none where it leaves that to its class.

    Raises:
        UserError: one is no size.
    """
    sizes = params.get("video_size", params.get("image_size"))
    for size in () if sizes is None else sizes if _is_list_of_sizes(sizes) else (sizes,):
        if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
            raise UserError(f"data.params.video_size has {size!r}; expected [height, width] in pixels")
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
    """Return the checkpoint that `resume` means, None for a new run, and whether the run is complete.

    Args:
        locate: returns the checkpoint that a path means; raises UserError if there is none.
        step_of: returns the step that a checkpoint is of, as its name says; None: its name does not.
        run_of: returns the folder of a checkpoint's run.

    Raises:
        UserError: there is no such checkpoint, or a run that is named by its path is complete.
    """
    checkpoint = find_resume(LoopSettings.from_args(args), locate)
    if checkpoint is None:
        return None, False
    step = step_of(checkpoint)
    complete = step is not None and step >= args.train_iters
    if complete and args.resume != "latest":  # which a command has that is started again until all is done
        raise UserError(f"resume: {checkpoint} is at step {step} of {args.train_iters}: raise train_iters to go on")
    if not complete and (change := describe_change(run_of(checkpoint), args.deterministic)):
        log.warning("%s", change)
    return checkpoint, complete
