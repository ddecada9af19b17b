"""Take and restore the state of a run that its checkpoints hold beside the tensors.

It is the content of state.json, whose layout is `files.training_state.TRAINING_STATE`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from cogvideox_sat.clips.reader_record import KEY
from cogvideox_sat.files.training_state import taken_from
from cogvideox_sat.runs import random_state
from cogvideox_sat.training.checkpoint_reading import restore_optimizer
from cogvideox_sat.training.deepspeed_adapter import inner_optimizer
from cogvideox_sat.training.plan import STATE_FILE
from sgm.errors import UserError


def run_state(
    network: deepspeed.DeepSpeedEngine,
    device: torch.device,
    *,
    data: Mapping[str, Any],
    losses: list[float],
    skipped: Mapping[str, int],
    reader: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Return the state of a run; the saver adds the step and the optimizer's numbers.

    This is collective: it has the random states of all processes.

    Args:
        data: position in the data.
        losses: sum and number of the losses since the last line of the log, the mean over all clips' processes.
        skipped: counts of skipped steps.
        reader: decoder of the videos.
    """
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, random_state.capture(device))
    return {
        "optimizer_type": type(inner_optimizer(network)).__name__,
        "data": data,
        "schedule": network.lr_scheduler.state_dict(),
        "random": states,
        "losses": losses,
        "skipped": skipped,
        KEY: reader,
    }


def restore(
    network: deepspeed.DeepSpeedEngine, checkpoint: Path, state: Mapping[str, Any], device: torch.device
) -> None:
    """Restore the optimizer with its tensors, the schedule, and this process's random state.

    Random states are those of a run with as many processes; with another number, they start anew.

    Args:
        checkpoint: folder of the iteration.
        state: the content of its state.json.

    Raises:
        UserError: the checkpoint is of another optimizer, or is damaged.
    """
    optimizer = type(inner_optimizer(network)).__name__
    if state["optimizer_type"] != optimizer:
        raise UserError(f"resume: {checkpoint} was trained with {state['optimizer_type']}, not with {optimizer}")
    restore_optimizer(network, checkpoint, state)
    with taken_from(checkpoint / STATE_FILE):
        network.lr_scheduler.load_state_dict(state["schedule"])
        if len(state["random"]) == dist.get_world_size():
            random_state.restore(state["random"][dist.get_rank()], device)
