"""One VAE training run, assembled around Lightning's `Trainer`.

It is the part of `train_vae.py` that needs PyTorch. `vae_training.run_keeper` does what happens between the steps.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from cogvideox_sat.configuration.argument_lists import VaeTrainingArguments
from cogvideox_sat.configuration.determinism import deterministic_arithmetic
from cogvideox_sat.configuration.memory_advice import vae_training_advice
from cogvideox_sat.configuration.model_checks import check_autoencoder_sizes
from cogvideox_sat.configuration.settings import LoopSettings
from cogvideox_sat.configuration.vae_training_arguments import ENGINE_KEYS
from cogvideox_sat.files.training_state import MISFITS, damaged, taken_from
from cogvideox_sat.parallel.agreement import (
    from_first_process,
    join_processes,
    leave_processes,
    limited_collectives,
)
from cogvideox_sat.parallel.process_failures import failing_together
from cogvideox_sat.runs.data import StepShare, TrainingData, open_training_data, open_validation_data
from cogvideox_sat.runs.folders import new_run_folder, removed_if_empty
from cogvideox_sat.runs.retention import last_saved
from cogvideox_sat.runs.step_clock import StepClock
from cogvideox_sat.runs.vae_data import vae_data_settings
from cogvideox_sat.vae_training.checkpoint import RUN_STATE, WholeFiles, check_fits, read_checkpoint
from cogvideox_sat.vae_training.lightning_trainer import Devices, choose_devices, make_trainer, quiet_lightning
from cogvideox_sat.vae_training.plan import VaeTrainingPlan, run_of
from cogvideox_sat.vae_training.reconstructions import ReconstructionReport
from cogvideox_sat.vae_training.run_keeper import RunKeeper
from sgm.config_places import section
from sgm.context_parallel import split_evenly
from sgm.errors import UserError
from sgm.memory_errors import memory_guard
from sgm.util import instantiate_from_config

logger = logging.getLogger(__name__)


def run(args: VaeTrainingArguments, plan: VaeTrainingPlan) -> int:
    """Train as planned; return the exit code.

    Raises:
        UserError: the device, the data, the model or a checkpoint cannot be used.
    """
    quiet_lightning()
    devices = choose_devices(args, plan.processes)
    join_processes(args.collective_timeout)
    try:
        resume = from_first_process(lambda: plan.resume)
        folder = run_of(resume) if resume else from_first_process(lambda: new_folder(args))
        torch.manual_seed(args.seed)  # all processes initialise the same values
        with (
            failing_together(),
            limited_collectives(args.collective_timeout),
            removed_if_empty(folder),
            deterministic_arithmetic(args.deterministic),
        ):
            fit(args, plan, devices, folder, resume)
        return 0
    finally:
        leave_processes()


def new_folder(args: VaeTrainingArguments) -> Path:
    """Create the folder of a new run, and return it."""
    return new_run_folder(LoopSettings.from_args(args), datetime.now())


def fit(args: VaeTrainingArguments, plan: VaeTrainingPlan, devices: Devices, folder: Path, resume: Path | None) -> None:
    """Assemble the parts, and train with Lightning.

    Args:
        folder: folder of the run.
        resume: the checkpoint to continue from; None: a new run.

    Raises:
        UserError: the data, the model or the checkpoint cannot be used, or memory is full.
    """
    content = read_checkpoint(resume) if resume else None
    state = content[RUN_STATE] if content else None
    share = StepShare(args.batch_size, plan.accumulation, dist.get_rank() // plan.ranks_per_clip, plan.data_ranks)
    data, report = open_data(args, plan, share, folder, state)
    engine = build_engine(args)
    if content and resume:
        check_fits(content, engine, resume)
    clock, files = StepClock(), WholeFiles(content)
    del content  # the trainer restores it from `files`, which then lets go of it
    settings = LoopSettings.from_args(args)
    with taken_from(resume) if resume else nullcontext():
        keeper = RunKeeper(settings, plan, share, folder, data, clock=clock, state=state, report=report, files=files)
    trainer = make_trainer(args, plan, engine, devices, keeper)
    with (
        errors_of_training(resume, keeper),
        memory_guard("training", lambda _: vae_training_advice(args, last_saved(folder))),
    ):
        trainer.fit(
            engine,
            train_dataloaders=Batches(data.loader, plan, clock),
            val_dataloaders=Batches(report.clips, plan) if report else None,
            ckpt_path=resume,
        )


def open_data(
    args: VaeTrainingArguments, plan: VaeTrainingPlan, share: StepShare, folder: Path, state: dict[str, Any] | None
) -> tuple[TrainingData, ReconstructionReport | None]:
    """Return the training data, and the evaluations; None for these if the run has none.

    Args:
        folder: folder of the run.
        state: the state of a run to continue; None: a new run.

    Raises:
        UserError: the data cannot be used.
    """
    settings, loop = vae_data_settings(args, plan.time_factor), LoopSettings.from_args(args)
    data = open_training_data(folder, settings, share, loop.train_iters, state, logger)
    if not settings.valid_data or not loop.eval_interval:
        return data, None
    held_out = open_validation_data(folder, settings, share)
    fps = held_out.dataset.sampling.fps
    return data, ReconstructionReport(held_out.loader, folder, args.num_log_videos, fps=fps)


@contextmanager
def errors_of_training(resume: Path | None, keeper: RunKeeper) -> Iterator[None]:
    """Turn Lightning's exceptions in the block into those of a command.

    Raises:
        UserError: `resume` does not fit, which shows before the run has started.
        KeyboardInterrupt: the run was interrupted.
    """
    try:
        yield
    except (*MISFITS, pl.utilities.exceptions.MisconfigurationException) as error:
        if resume is None or keeper.started:
            raise
        raise damaged(resume, str(error)) from error
    except SystemExit:  # Lightning raises this after an interruption
        raise KeyboardInterrupt from None


class Batches:
    """Iterates over the batches of a loader, reduced to the part for this process.

    Args:
        clock: counts the time of waiting for batches.
    """

    def __init__(self, loader: Iterable[Any], plan: VaeTrainingPlan, clock: StepClock | None = None):
        self.loader, self.plan, self.clock = loader, plan, clock

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = iter(self.loader)
        while True:
            with self.clock.waiting() if self.clock else nullcontext():
                batch = next(batches, None)
            if batch is None:
                return
            yield own_frames(batch[0] if isinstance(batch, tuple) else batch, self.plan)


def own_frames(batch: dict[str, Any], plan: VaeTrainingPlan) -> dict[str, Any]:
    """Return the batch with only this process's frames of its clips.

    If processes do not divide clips, the batch is returned unchanged.
    """
    if not plan.divides_input:
        return batch
    rank = dist.get_rank() % plan.ranks_per_clip
    clips, axis = batch[plan.input_key], plan.time_axis
    latents = split_evenly((clips.shape[axis] - 1) // plan.time_factor + 1, plan.ranks_per_clip)
    # The first latent frame of a clip is one frame, each of the others `time_factor`.
    end = (sum(latents[: rank + 1]) - 1) * plan.time_factor + 1
    begin = (sum(latents[:rank]) - 1) * plan.time_factor + 1 if rank else 0
    return {**batch, plan.input_key: clips.narrow(axis, begin, end - begin)}


def build_engine(args: VaeTrainingArguments) -> pl.LightningModule:
    """Return the Lightning module that the `model:` section describes.

    Raises:
        UserError: the section is wrong, or names a class that this command cannot train.
    """
    trainer = args.lightning_config.get("trainer") or {}
    settings = {name: trainer[name] for name in ENGINE_KEYS if trainer.get(name) is not None}
    described = {name: args.model_config[name] for name in ("target", "params")}
    with section("model", described, args.sources):
        check_autoencoder_sizes(described["params"])
        engine = instantiate_from_config(described, **settings)
    if not isinstance(engine, pl.LightningModule) or not hasattr(engine, "coder_state_dict"):
        raise UserError(
            f"model.target: {args.model_config['target']} cannot be trained; use "
            "vae_modules.autoencoder.VideoAutoencodingEngine"
        )
    engine.learning_rate = args.model_config["base_learning_rate"]
    trained = sum(parameter.numel() for parameter in engine.parameters() if parameter.requires_grad)
    logger.info("%s: %.1f million parameters to train", type(engine).__name__, trained / 1e6)
    return engine
