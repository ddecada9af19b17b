"""When the checkpoints of a VAE's training are written: between its steps, or behind them."""

import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from torch import Tensor

from cogvideox_sat.parallel.agreement import from_first_process
from cogvideox_sat.runs.background_writing import BackgroundWriter
from cogvideox_sat.runs.staging import StagingMemory, staged
from cogvideox_sat.vae_training.checkpoint import WholeFiles, publish, write_weights, write_whole
from cogvideox_sat.vae_training.plan import CHECKPOINTS

logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Writes the checkpoints of a run; all processes call `save` and `finish`, and the first one writes.

    Behind the steps at most one is written at a time, by a thread, from a copy in host memory. What goes wrong there is
    raised when the run waits for it.

    Args:
        folder: of the run.
        keep_last: how many checkpoints to keep; None: all.
        files: what the trainer writes them with.
        memory: for copies; None: they are written between the steps.
    """

    def __init__(self, folder: Path, keep_last: int | None, files: WholeFiles, memory: StagingMemory | None):
        self.folder, self.keep_last, self.files, self.memory = folder, keep_last, files, memory
        self.leads = dist.get_rank() == 0
        self.thread = BackgroundWriter()
        self.unfinished = False

    def save(self, trainer: pl.Trainer, module: pl.LightningModule, step: int, *, wait: bool) -> None:
        """Write the checkpoint of `step`; the one before is finished first.

        Args:
            wait: until it is written; else, if checkpoints are written behind the steps, only until it is copied.

        Raises:
            UserError: the disk is full or cannot be written to; the previous checkpoint is still there.
        """
        self.finish()
        file = self.folder / CHECKPOINTS / f"step={step}.ckpt"
        self.files.memory = None if wait else self.memory
        start = time.perf_counter()
        trainer.save_checkpoint(file)
        self.unfinished = self.memory is not None
        if not self.leads:
            return
        weights = module.coder_state_dict(ema=getattr(module, "ema_decay", None) is not None)
        content, self.files.staged = self.files.staged, None
        if content is None:  # and the file is written
            self.write_rest(file, weights)
            return
        assert self.memory is not None
        weights = staged(weights, self.memory)
        self.memory.wait()
        logger.info("step %d: copied in %.2f s, to be written behind the steps", step, time.perf_counter() - start)
        self.thread.start(f"the checkpoint of step {step}", partial(self.write, file, weights, content))

    def write(self, file: Path, weights: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """Write a checkpoint from a copy of it."""
        write_whole(content, file)
        self.write_rest(file, weights)

    def write_rest(self, file: Path, weights: Mapping[str, Tensor]) -> None:
        """Write what belongs to a checkpoint whose file is there, and make it the newest."""
        write_weights(weights, self.folder)
        publish(file, self.folder, self.keep_last)
        logger.info("%s: wrote %s", file.stem.replace("=", " "), file)

    @property
    def failed(self) -> bool:
        """Return whether the checkpoint that this process writes behind the steps cannot be written."""
        return self.thread.failed

    def finish(self) -> None:
        """Wait for the checkpoint that is written behind the steps, if there is one.

        Raises:
            UserError: it cannot be written; the previous checkpoint is still there. On all processes.
        """
        if self.unfinished:
            self.unfinished = False
            from_first_process(self.thread.finish, "the checkpoint")

    def settle(self) -> None:
        """Wait for that checkpoint where the run ends with an error; other processes need not call this."""
        self.thread.settle()
