"""Write the checkpoints of a training run, for any number of processes.

All processes assemble the tensors; the first process of each model-parallel share writes. If writing fails on one
process, all processes raise its error. `training.checkpoint_folders` has the layout of the files.
"""

import json
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from sat import mpu

from cogvideox_sat.parallel.agreement import any_process, meet, patient_group
from cogvideox_sat.runs.background_writing import BackgroundSaver, wait_while_growing
from cogvideox_sat.runs.disk_errors import WRITE_ERRORS, cannot_write
from cogvideox_sat.runs.staging import StagingMemory
from cogvideox_sat.training import optimizer_state
from cogvideox_sat.training.checkpoint_folders import CheckpointFolders
from cogvideox_sat.training.checkpoint_tensors import (
    SHADOW,
    OptimizerTensors,
    Weights,
    copied,
    estimated_bytes,
    gathered_weights,
    on_host,
)
from sgm.errors import UserError

logger = logging.getLogger(__name__)

_Exchange = Callable[[str], list[str]]


class CheckpointSaver(BackgroundSaver[CheckpointFolders]):
    """Writes the checkpoints of a run, between its steps or in the background.

    All processes call each of its methods. In the background, one checkpoint at a time is written, from a copy in host
    memory, by a thread of each process that writes. These threads have their own process group. Their errors are raised
    when the run waits for them.

    Args:
        full: write the whole network, rather than only its trained parameters.
        keep_last: number of checkpoints to keep; None: all.
        background: write in the background, if host memory has room for a copy.
    """

    def __init__(
        self,
        run_folder: Path,
        engine: deepspeed.DeepSpeedEngine,
        *,
        full: bool,
        keep_last: int | None,
        background: bool = False,
    ):
        super().__init__()
        self.run_folder, self.engine, self.full, self.keep_last = run_folder, engine, full, keep_last
        self.leads, self.writes = dist.get_rank() == 0, mpu.get_data_parallel_rank() == 0
        on_gpu = next(engine.module.parameters()).is_cuda
        self.memory = StagingMemory(pinned=on_gpu) if background else None
        self.asked = False  # whether the room in host memory was checked
        self.writers = patient_group(self.writes) if background else None

    def save(self, step: int, state: dict[str, Any], *, wait: bool = True) -> None:
        """Write the checkpoint of `step`, after finishing the one before.

        Args:
            state: content of state.json besides the optimizer's numbers; JSON-able, taken from the first process.
            wait: return when the checkpoint is written. Otherwise, with background writing, return when it is copied.

        Raises:
            UserError: the disk is full or cannot be written to; the previous checkpoint is kept. On all processes.
        """
        self.finish()
        checkpoint = CheckpointFolders(
            self.run_folder,
            step,
            needed=estimated_bytes(self.engine, self.full),
            has_ema=SHADOW in optimizer_state.tensor_kinds(self.engine),
            state=json.dumps({"step": step, "optimizer": optimizer_state.counters(self.engine), **state}),
        )
        _together(checkpoint.prepare if self.leads else _nothing, checkpoint, _from_all)
        memory = None if wait else self.memory_for(checkpoint.needed)
        copy = memory.copy if memory else on_host
        weights = gathered_weights(self.engine.module, self.full, self.writes, copy)
        tensors = copied(optimizer_state.full_tensors(self.engine), self.writes, copy)
        if memory is None:
            self.write(checkpoint, weights, tensors, _from_all)
            return
        start = time.perf_counter()
        memory.start_over(checkpoint.needed)
        staged = list(weights), list(tensors)
        memory.wait()
        self.unfinished = checkpoint
        if self.writes:
            exchange = partial(_from_group, self.writers)
            self.write_behind(step, start, lambda: self.write(checkpoint, *staged, exchange))

    def write(
        self, checkpoint: CheckpointFolders, weights: Weights, tensors: OptimizerTensors, exchange: _Exchange
    ) -> None:
        """Write all files, and mark them as the newest checkpoint."""
        _together(lambda: checkpoint.write(weights, tensors, self.writes), checkpoint, exchange)
        _together(lambda: checkpoint.publish(self.keep_last) if self.leads else None, checkpoint, exchange)
        logger.info("step %d: wrote %s", checkpoint.step, checkpoint.folder)

    def memory_for(self, needed: int) -> StagingMemory | None:
        """Return the memory for copies of checkpoints, or None to write between steps.

        The room in host memory is checked once.
        """
        if self.memory is not None and not self.asked:
            self.asked = True
            if any_process(self.writes and not self.memory.allows(needed)):
                self.memory = None
        return self.memory

    def on_all(self, finish: Callable[[], None], content: CheckpointFolders) -> None:
        """Call `finish` on all processes, and share their errors; see `BackgroundSaver`."""
        _together(finish, content, _from_all)

    def await_writer(self, content: CheckpointFolders) -> None:
        """Wait for the writing process; see `BackgroundSaver`.

        A launcher may end all processes when this one has ended.
        """
        if not self.writes:
            wait_while_growing(content.part)


def _nothing() -> None:
    """Do nothing: the first process writes, and this one waits."""


def _together(action: Callable[[], Any], checkpoint: CheckpointFolders, exchange: _Exchange) -> None:
    """Run an action that may differ between processes; if one fails, all raise UserError.

    Args:
        exchange: sends this process's error to the others, and returns the errors of all.
    """
    problem = ""
    try:
        action()
    except UserError as error:
        problem = str(error)
    except WRITE_ERRORS as error:
        problem = str(cannot_write(checkpoint.folder, error, checkpoint.needed))
    if first := next(filter(None, exchange(problem)), None):
        if dist.get_rank() == 0:
            checkpoint.give_up()
        raise UserError(first)


def _from_all(problem: str) -> list[str]:
    """Exchange errors with all processes, which wait without a time limit."""
    meet("the checkpoint")
    return _from_group(None, problem, size=dist.get_world_size())


def _from_group(group: dist.ProcessGroup | None, problem: str, size: int = 1) -> list[str]:
    """Exchange errors with the processes of a group."""
    problems = [problem] * (size if group is None else group.size())
    if len(problems) > 1:
        dist.all_gather_object(problems, problem, group=group)
    return problems
