"""The files of a VAE training run; each file is written atomically.

    {run}/checkpoints/step=N.ckpt  everything that resuming needs, in Lightning's format; contains no code
    {run}/3d-vae.pt                {"state_dict": ...}, the weights of the newest checkpoint for other programs
    {run}/latest                   the name of the newest checkpoint; written last

If the process is killed at any moment, the previous checkpoint remains.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor, nn

from cogvideox_sat.files.atomic import replaced_when_complete
from cogvideox_sat.files.training_state import VAE_RUN, anything, counters, find_misfit, list_of, mapping_of
from cogvideox_sat.runs.disk_errors import WRITE_ERRORS, cannot_write, check_room_for_checkpoint
from cogvideox_sat.runs.retention import mark_newest, outdated, remove_unfinished
from cogvideox_sat.runs.staging import StagingMemory, staged
from cogvideox_sat.vae_training.plan import CHECKPOINTS, step_of
from sgm.errors import UserError, some
from sgm.weights import read_state_dict

RUN_STATE = "run"  # the entry of a checkpoint that the run itself writes
CHECKPOINT = {
    "state_dict": mapping_of(lambda value: isinstance(value, Tensor)),
    "optimizer_states": list_of(mapping_of(anything)),
    "loops": mapping_of(counters),
    RUN_STATE: VAE_RUN,
}
WEIGHTS_FILE = "3d-vae.pt"


class WholeFiles(CheckpointIO):
    """Writes checkpoints atomically, and reads them without running code in them.

    Args:
        content: the content of a checkpoint that has already been read; the first `load_checkpoint` returns it.

    Attributes:
        memory: host memory into which a checkpoint is copied instead of being written, if there is room.
        staged: such a copy.
    """

    def __init__(self, content: dict[str, Any] | None = None):
        self.content = content
        self.memory: StagingMemory | None = None
        self.staged: dict[str, Any] | None = None
        self.has_room: bool | None = None  # None: not checked yet

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if self.memory is None or not self.fits(checkpoint, self.memory):
            write_whole(checkpoint, Path(path))
        else:
            check_writable(checkpoint, Path(path))
            self.staged = staged(checkpoint, self.memory)

    def fits(self, checkpoint: Mapping[str, Any], memory: StagingMemory) -> bool:
        """Return whether host memory has room for copies of checkpoints.

        The first call checks this, and logs it if there is no room.
        """
        needed = saved_bytes(checkpoint) + saved_bytes(checkpoint["state_dict"])  # plus the weights for other programs
        if self.has_room is None:
            self.has_room = memory.allows(needed)
        memory.start_over(needed)
        return self.has_room

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        content, self.content = self.content, None
        return content or read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def write_whole(content: Any, path: Path) -> None:
    """Write `content` with `torch.save`, atomically.

    Raises:
        UserError: the disk is full or cannot be written to; an existing file is kept.
    """
    check_writable(content, path)
    needed = saved_bytes(content)
    try:
        with replaced_when_complete(path) as part:
            torch.save(content, part)
    except WRITE_ERRORS as error:
        raise cannot_write(path, error, needed) from error


def check_writable(content: Any, path: Path) -> None:
    """Remove unfinished files, and check that the disk has room for `content`.

    Raises:
        UserError: the disk is full or cannot be written to.
    """
    needed = saved_bytes(content)
    try:
        remove_unfinished(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room_for_checkpoint(path, needed)
    except WRITE_ERRORS as error:
        raise cannot_write(path, error, needed) from error


def saved_bytes(content: Any) -> int:
    """Return approximately how many bytes `torch.save` writes: those of all storages."""
    storages: dict[int, int] = {}
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return sum(storages.values())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a `step=N.ckpt`.

    Raises:
        UserError: the file is damaged, or was not written by this command.
    """
    content = read_state_dict(path)
    if misfit := find_misfit(content, CHECKPOINT):
        raise UserError(
            f"resume: {path} has no complete training state: {misfit}; to start from its weights, give it as "
            "model.params.ckpt_path"
        )
    if step_of(path) not in (None, step := content[RUN_STATE]["step"]):
        raise UserError(f"resume: {path} holds the state of step {step}; rename the file, or name another checkpoint")
    return content


def check_fits(content: Mapping[str, Any], module: nn.Module, path: Path) -> None:
    """Check that a checkpoint belongs to this model.

    Raises:
        UserError: a name is missing on one side, or a shape differs.
    """
    ours, theirs = module.state_dict(), content["state_dict"]
    for name in (*ours, *theirs):
        if name not in theirs or name not in ours:
            where = "the model" if name in ours else "the checkpoint"
            raise UserError(f"resume: {path} is of another model: only {where} has {name}")
        ours_shape, theirs_shape = (tuple(getattr(side[name], "shape", ())) for side in (ours, theirs))
        if ours_shape != theirs_shape:
            raise UserError(
                f"resume: {path} is of another model: {name} is {theirs_shape} there and {ours_shape} in the model"
            )


def check_optimizers(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Check that restored optimizer states have the parameters' shapes and equal keys.

    Raises:
        ValueError: they do not.
    """
    for optimizer in optimizers:
        kinds: set[str] | None = None
        for parameter, state in optimizer.state.items():
            kinds = set(state) if kinds is None else kinds
            if set(state) != kinds:
                raise ValueError(f"the optimizer has {some(sorted(set(state) ^ kinds))} for some weights only")
            for kind, value in state.items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    raise ValueError(
                        f"{kind} of a weight of shape {tuple(parameter.shape)} has shape {tuple(value.shape)}"
                    )


def write_weights(state_dict: Mapping[str, Tensor], run_folder: Path) -> None:
    """Write `3d-vae.pt`, as float32 on the CPU."""
    weights = {name: value.detach().to("cpu", torch.float32) for name, value in state_dict.items()}
    write_whole({"state_dict": weights}, run_folder / WEIGHTS_FILE)


def publish(checkpoint: Path, run_folder: Path, keep_last: int | None) -> None:
    """Mark `checkpoint` as the newest one, and delete outdated ones.

    Args:
        keep_last: number of checkpoints to keep; None: all.

    Raises:
        UserError: an outdated checkpoint cannot be deleted.
    """
    mark_newest(run_folder, checkpoint.name)
    steps = {step: file for file in (run_folder / CHECKPOINTS).iterdir() if (step := step_of(file)) is not None}
    newest = step_of(checkpoint)
    assert newest is not None, checkpoint
    for step in outdated(steps, newest, keep_last):
        try:
            steps[step].unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot delete {steps[step]}: {error.strerror or error}; check the permissions of its folder"
            ) from error
