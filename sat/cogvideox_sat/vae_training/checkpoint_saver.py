"""Write the checkpoints of VAE training, between its steps or in the background."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from torch import Tensor

from cogvideox_sat.parallel.agreement import from_first_process
from cogvideox_sat.runs.background_writing import BackgroundSaver
from cogvideox_sat.runs.staging import StagingMemory, staged
from cogvideox_sat.vae_training.checkpoint import WholeFiles, publish, write_weights, write_whole
from cogvideox_sat.vae_training.plan import CHECKPOINTS

logger = logging.getLogger(__name__)


class CheckpointSaver(BackgroundSaver[Path]):
    """Writes the checkpoints of a run.

    All processes call `save` and `finish`, and the first one writes. In the background, one checkpoint at a time is
    written, by a thread, from a copy in host memory. Errors of the thread are raised when the run waits for it.

    Args:
        folder: folder of the run.
        keep_last: number of checkpoints to keep; None: all.
        files: the plugin with which the trainer writes checkpoints.
        memory: memory for copies; None: checkpoints are written between the steps.
    """

    def __init__(self, folder: Path, keep_last: int | None, files: WholeFiles, memory: StagingMemory | None):
        super().__init__()
        self.folder, self.keep_last, self.files, self.memory = folder, keep_last, files, memory
        self.leads = dist.get_rank() == 0

    def save(self, trainer: pl.Trainer, module: pl.LightningModule, step: int, *, wait: bool) -> None:
        """Write the checkpoint of `step`, after finishing the one before.

        Args:
            wait: return when the checkpoint is written. Otherwise, with background writing, return when it is copied.

        Raises:
            UserError: the disk is full or cannot be written to; the previous checkpoint is kept.
        """
        self.finish()
        file = self.folder / CHECKPOINTS / f"step={step}.ckpt"
        self.files.memory = None if wait else self.memory
        start = time.perf_counter()
        trainer.save_checkpoint(file)
        self.unfinished = file if self.memory is not None else None
        if not self.leads:
            return
        weights = module.coder_state_dict(ema=getattr(module, "ema_decay", None) is not None)
        content, self.files.staged = self.files.staged, None
        if content is None:  # the file is already written
            self.write_rest(file, weights)
            return
        assert self.memory is not None
        weights = staged(weights, self.memory)
        self.memory.wait()
        self.write_behind(step, start, partial(self.write, file, weights, content))

    def write(self, file: Path, weights: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """Write a checkpoint from its copy."""
        write_whole(content, file)
        self.write_rest(file, weights)

    def write_rest(self, file: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the other files of a checkpoint, and mark it as the newest."""
        write_weights(weights, self.folder)
        publish(file, self.folder, self.keep_last)
        logger.info("%s: wrote %s", file.stem.replace("=", " "), file)

    def on_all(self, finish: Callable[[], None], content: Path) -> None:
        """Call `finish` on the first process, and share its errors; see `BackgroundSaver`."""
        from_first_process(finish, "the checkpoint")
