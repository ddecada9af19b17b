"""One VAE training run, assembled around Lightning's `Trainer`.

It is the part of `train_vae.py` that needs PyTorch. `vae_training.run_keeper` does what happens between the steps.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, Strategy

from cogvideox_sat.configuration.argument_lists import VaeTrainingArguments
from cogvideox_sat.configuration.determinism import deterministic_arithmetic
from cogvideox_sat.configuration.memory_advice import vae_training_advice
from cogvideox_sat.configuration.model_checks import check_autoencoder_sizes
from cogvideox_sat.configuration.settings import LoopSettings
from cogvideox_sat.configuration.vae_training_arguments import ENGINE_KEYS, TRAINER_KEYS
from cogvideox_sat.files.training_state import MISFITS, damaged, taken_from
from cogvideox_sat.parallel.agreement import (
    from_first_process,
    join_processes,
    leave_processes,
    limited_collectives,
    meet,
)
from cogvideox_sat.parallel.devices import choose_device, fast_dtype
from cogvideox_sat.parallel.process_failures import failing_together
from cogvideox_sat.runs.data import StepShare, TrainingData, open_training_data, open_validation_data
from cogvideox_sat.runs.folders import new_run_folder, removed_if_empty
from cogvideox_sat.runs.retention import last_saved
from cogvideox_sat.runs.step_clock import StepClock
from cogvideox_sat.runs.vae_data import vae_data_settings
from cogvideox_sat.vae_training.checkpoint import RUN_STATE, WholeFiles, check_fits, read_checkpoint
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


class Devices(NamedTuple):
    """The devices of this machine's processes, as the arguments of Lightning's `Trainer`."""

    accelerator: str
    devices: int | list[int]


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


# ---------------------------------------------------------------- model and trainer


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


def choose_devices(args: VaeTrainingArguments, processes: int) -> Devices:
    """Return the devices for the processes of this machine; on GPUs, one for each.

    Args:
        processes: number of processes of the run, on all machines.

    Raises:
        UserError: a GPU does not exist.
    """
    wanted = args.device or (args.lightning_config.get("trainer") or {}).get("accelerator", "auto")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    device = choose_device({"auto": None, "gpu": "cuda"}.get(wanted, wanted))
    if device.type == "cpu":
        return Devices("cpu", here)
    if here > torch.cuda.device_count():
        raise UserError(
            f"device: {here} processes need one GPU each, but PyTorch sees {torch.cuda.device_count()}; start fewer "
            "processes, or give --device cpu"
        )
    if processes == 1:
        return Devices("gpu", [device.index])
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # NCCL uses the current device
    return Devices("gpu", here)


def settings_of_trainer(args: VaeTrainingArguments, accelerator: str) -> dict[str, Any]:
    """Return the arguments of Lightning's `Trainer`, with a precision that suits the device.

    A CPU without fast float16 gets another precision.
    """
    given = args.lightning_config.get("trainer") or {}
    settings = {name: given[name] for name in TRAINER_KEYS if given.get(name) is not None}
    if args.deterministic or settings.get("deterministic") is True:
        settings.pop("deterministic", None)  # the run itself sets deterministic mode, and resets it at the end
    precision = str(settings.get("precision", ""))
    if accelerator == "cpu" and precision.startswith("16"):
        dtype = fast_dtype(torch.float16, torch.device("cpu"))
        if dtype != torch.float16:
            kind = "true" if precision == "16-true" else "mixed"
            settings["precision"] = f"bf16-{kind}" if dtype == torch.bfloat16 else "32-true"
    return settings


def make_trainer(
    args: VaeTrainingArguments,
    plan: VaeTrainingPlan,
    engine: pl.LightningModule,
    devices: Devices,
    keeper: RunKeeper,
) -> pl.Trainer:
    """Return Lightning's trainer for a run.

    Raises:
        UserError: Lightning refuses a setting.
    """
    settings = settings_of_trainer(args, devices.accelerator)
    plugins: list[Any] = [keeper.files]
    # Whatever started the processes, torchrun's variables give their ranks. Lightning would take the variables of a
    # SLURM job, which a single process within the job sees too, for those of a step with several processes.
    plugins.append(TorchElasticEnvironment() if plan.processes > 1 else LightningEnvironment())
    try:
        return pl.Trainer(
            accelerator=devices.accelerator,
            devices=devices.devices,
            num_nodes=plan.processes // devices.devices if isinstance(devices.devices, int) else 1,
            strategy=strategy(plan, engine),
            plugins=plugins,
            callbacks=[keeper],
            max_epochs=-1,  # the keeper ends the run
            max_steps=-1,
            val_check_interval=(args.eval_interval or 1) * plan.accumulation if keeper.report else None,
            check_val_every_n_epoch=None if keeper.report else 1,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **settings,
        )
    except (ValueError, TypeError, pl.utilities.exceptions.MisconfigurationException) as error:
        raise UserError(f"lightning.trainer: {' '.join(str(error).split())}") from error


def strategy(plan: VaeTrainingPlan, engine: pl.LightningModule) -> str | Strategy:
    """Return the strategy with which processes average their gradients."""
    if plan.processes == 1:
        return "auto"
    # If autoencoder and discriminator are trained in turn, every step leaves some parameters without a gradient.
    return _PatientDDP(find_unused_parameters=getattr(engine, "has_discriminator", True))


class _PatientDDP(DDPStrategy):
    """DDP that waits without a time limit while the first process writes a checkpoint."""

    def barrier(self, name: str | None = None) -> None:
        if dist.is_initialized():
            meet(name or "the others")


def quiet_lightning() -> None:
    """Hide Lightning's messages about itself, and its advice for other kinds of runs."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric)\.")
