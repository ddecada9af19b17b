"""Count the steps of VAE training; log, save, evaluate and stop between them."""

import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from cogvideox_sat.clips.reader_record import KEY
from cogvideox_sat.configuration.settings import LoopSettings
from cogvideox_sat.parallel import process_watch
from cogvideox_sat.parallel.agreement import any_process, flags_of_any_process, meet
from cogvideox_sat.runs import progress, random_state
from cogvideox_sat.runs.data import StepShare, TrainingData
from cogvideox_sat.runs.folders import open_run_folder
from cogvideox_sat.runs.metrics import MetricsWriter
from cogvideox_sat.runs.progress import format_values, progress_bar
from cogvideox_sat.runs.schedule import Schedule
from cogvideox_sat.runs.skipped_steps import check_finite
from cogvideox_sat.runs.staging import StagingMemory
from cogvideox_sat.runs.step_clock import StepClock, peak_memory
from cogvideox_sat.runs.stop_signals import stop_requests
from cogvideox_sat.vae_training.checkpoint import RUN_STATE, WEIGHTS_FILE, WholeFiles, check_optimizers
from cogvideox_sat.vae_training.checkpoint_saver import CheckpointSaver
from cogvideox_sat.vae_training.plan import VaeTrainingPlan
from cogvideox_sat.vae_training.reconstructions import SHOWN, ReconstructionReport

logger = logging.getLogger(__name__)

# Formats of the values that are shown after a step and an evaluation; other values are only written to files.
FORMATS = {
    "train/loss/rec": "rec {:.4f}",
    "train/loss/disc": "disc {:.4f}",
    **{name: text for name, text in progress.FORMATS.items() if name != "loss"},
    "val/rec": "|x - x'| {:.4f}",
    "val/psnr": "PSNR {:.2f} dB",
    "val_ema/rec": "with averaged weights |x - x'| {:.4f}",
    "val_ema/psnr": "PSNR {:.2f} dB",
}


class Means:
    """Means of logged values since the last `take`; values stay on the device until then."""

    def __init__(self, sums: Mapping[str, tuple[float, int]] | None = None):
        self.sums = {name: (torch.tensor(total), count) for name, (total, count) in (sums or {}).items()}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add values by name."""
        for name, value in values.items():
            total, count = self.sums.get(name, (torch.zeros_like(value, dtype=torch.float32), 0))
            self.sums[name] = total.to(value.device) + value.detach().float(), count + 1

    def state(self) -> dict[str, tuple[float, int]]:
        """Return the argument for the constructor, as plain numbers of this process."""
        return {name: (float(total), count) for name, (total, count) in self.sums.items()}

    def take(self, device: torch.device) -> dict[str, float]:
        """Return the means over all processes, and start over; all processes call this."""
        names = sorted(self.sums)
        if not names:
            return {}
        means = torch.stack([self.sums[name][0].to(device) / self.sums[name][1] for name in names])
        if dist.get_world_size() > 1:
            dist.all_reduce(means)
        self.sums = {}
        return dict(zip(names, (means / dist.get_world_size()).tolist(), strict=True))


class RunKeeper(pl.Callback):
    """Counts steps and maintains the folder of a run.

    A step is one update of the weights, by the optimizer of the autoencoder or of the discriminator; it takes
    `accumulation` batches. The run ends after `train_iters` steps.

    Args:
        share: this process's part of each step.
        folder: folder of the run.
        data: the training data, whose position is saved in checkpoints.
        clock: measures the time of steps and of waiting for batches.
        state: the state from an earlier `on_save_checkpoint`, to continue from.
        report: evaluations; None: no evaluations.
        files: the plugin with which the trainer writes checkpoints.

    Raises:
        UserError: losses are not finite, too many clips are unreadable, or a file cannot be written.
    """

    def __init__(
        self,
        settings: LoopSettings,
        plan: VaeTrainingPlan,
        share: StepShare,
        folder: Path,
        data: TrainingData,
        clock: StepClock,
        state: Mapping[str, Any] | None,
        report: ReconstructionReport | None,
        files: WholeFiles,
    ):
        self.settings, self.schedule, self.plan, self.share = settings, Schedule(settings), plan, share
        self.folder, self.data, self.clock, self.report = folder, data, clock, report
        self.files = files
        self.leads = dist.get_rank() == 0
        self.step = state["step"] if state else 0
        self.batches = 0  # number of batches since the order was created
        ranks = state["ranks"] if state else []
        self.own_state = ranks[dist.get_rank()] if len(ranks) == dist.get_world_size() else None
        self.means = Means(self.own_state["means"] if self.own_state else None)
        self.started = False  # whether the state of the checkpoint is completely restored
        self.writer: MetricsWriter | None = None
        self.stack = ExitStack()

    # ------------------------------------------------------------ begin and end

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.own_state:
            random_state.restore(self.own_state["random"], module.device)
            check_optimizers(trainer.optimizers)
        self.started = True
        memory = StagingMemory(pinned=module.device.type == "cuda") if self.settings.background_checkpoints else None
        self.saver = CheckpointSaver(self.folder, self.settings.keep_last, self.files, memory)
        self.stack.enter_context(process_watch.before_the_end(self.saver.settle))
        self.bar = self.stack.enter_context(progress_bar(self.settings.train_iters, self.step, disabled=not self.leads))
        self.stack.enter_context(logging_redirect_tqdm())
        # Only now, since Lightning has just set its own handlers of signals.
        self.signals = self.stack.enter_context(stop_requests())
        if not self.leads:
            return
        self.writer = open_run_folder(self.folder, self.settings, self.data.reader, self.step)
        self.stack.callback(self.writer.close)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.stack.close()
        if self.signals:
            logger.info("stopped after step %d, which is saved; continue with --resume latest", self.step)
        weights = self.folder / WEIGHTS_FILE
        logger.info("the run is in %s; to use the autoencoder, name %s as its ckpt_path", self.folder, weights)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if self.started:
            self.saver.settle()
        self.stack.close()

    # ------------------------------------------------------------ steps

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        process_watch.begin(f"step {self.step + 1}", limited=True)
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Mapping[str, Any],
        batch: Mapping[str, Any],
        batch_idx: int,
    ) -> None:
        self.batches += 1
        self.data.unreadable.add(chain.from_iterable(batch.get("unreadable", ())))
        self.means.add(outputs["log"])
        if self.batches % self.share.accumulation:
            return
        self.step += 1
        self.bar.update()
        self.clock.step(self.share.clips)
        if self.schedule.logs(self.step):
            self.report_means(trainer, module)
        stopped, failed = flags_of_any_process(bool(self.signals), self.saver.failed)
        if failed:
            self.saver.finish()  # raises the error
        if stopped or self.schedule.saves(self.step):
            with self.clock.paused(), process_watch.phase("saving"):
                self.save(trainer, module, wait=stopped or self.schedule.is_last(self.step))
                meet("the checkpoint")
        if self.report:
            self.report.clips.step = self.step
        if stopped:
            trainer.limit_val_batches = 0  # otherwise Lightning would evaluate before it stops
        if stopped or self.schedule.is_last(self.step):
            trainer.should_stop = True

    def report_means(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log the means since the last report; all processes call this."""
        means = self.means.take(module.device)
        check_finite(means, self.step, "base_learning_rate")
        # Processes that share clips find the same unreadable clips.
        found = meet("the log", self.data.unreadable.found) // self.plan.ranks_per_clip
        values = {
            **({"loss": means["train/loss/total"]} if "train/loss/total" in means else {}),
            **means,
            **dict(zip(("lr", "lr_discriminator"), self.rates, strict=False)),
            "unreadable_clips": self.data.unreadable.check(found),
            "peak_memory_gib": peak_memory(module.device),
            **self.clock.rates(),
        }
        self.bar.set_postfix_str(format_values(values, FORMATS), refresh=False)
        logger.info("step %d: %s", self.step, format_values(values, FORMATS))
        if self.writer:
            self.writer.write(self.step, values)

    # ------------------------------------------------------------ checkpoints

    def save(self, trainer: pl.Trainer, module: pl.LightningModule, wait: bool) -> None:
        """Write a checkpoint; with `wait`, return when it is written."""
        if any_process(not all(math.isfinite(total) for total, _ in self.means.state().values())):
            self.report_means(trainer, module)  # raises an error that names the value
        self.saver.save(trainer, module, self.step, wait=wait)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        own = {"random": random_state.capture(module.device), "means": self.means.state()}
        ranks: list[dict[str, Any] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        position = {"step": self.step, "data": self.data.order.state(self.batches)}
        checkpoint[RUN_STATE] = {**position, "ranks": ranks, KEY: self.data.reader}

    # ------------------------------------------------------------ evaluations

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert self.report is not None  # Lightning evaluates only with one
        self.evaluation = ExitStack()
        self.evaluation.enter_context(self.clock.paused())
        self.evaluation.enter_context(process_watch.phase("evaluating"))
        self.evaluation.callback(random_state.restore, random_state.capture(module.device), module.device)
        self.report.start()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self.report is not None  # Lightning evaluates only with one
        self.report.add(module, batch, batch_idx)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert self.report is not None  # Lightning evaluates only with one
        meet("the evaluation")
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
        values |= self.report.results(module.device)
        logger.info("step %d: validation: %s", self.step, format_values(values, FORMATS))
        if self.writer:
            self.writer.write(self.step, values)
            for name, video in self.report.write_videos(self.step):
                self.writer.write_video(self.step, name, video, {"shows": SHOWN})
        meet("the videos of the evaluation")
        self.evaluation.close()
