"""Lightning's trainer for VAE training: its devices, precision, processes and plugins."""

import logging
import os
import warnings
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, Strategy

from cogvideox_sat.configuration.argument_lists import VaeTrainingArguments
from cogvideox_sat.configuration.vae_training_arguments import TRAINER_KEYS
from cogvideox_sat.parallel.agreement import meet
from cogvideox_sat.parallel.devices import choose_device, fast_dtype
from cogvideox_sat.vae_training.plan import VaeTrainingPlan
from cogvideox_sat.vae_training.run_keeper import RunKeeper
from sgm.errors import UserError


class Devices(NamedTuple):
    """The devices of this machine's processes, as the arguments of Lightning's `Trainer`."""

    accelerator: str
    devices: int | list[int]


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
