"""Read and check the arguments and the configuration of the command that trains a VAE.

An argument is a field of `VaeTrainingArguments` in `argument_lists`. Nothing here imports PyTorch.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from cogvideox_sat.configuration.argument_limits import check_least, check_run, check_seed_and_device
from cogvideox_sat.configuration.argument_lists import VaeTrainingArguments
from cogvideox_sat.configuration.argument_parser import parser_for
from cogvideox_sat.configuration.argument_reading import read_command_line, with_located_inputs
from cogvideox_sat.configuration.argument_values import check_section
from cogvideox_sat.configuration.data_mixing import split_entries
from cogvideox_sat.configuration.determinism import recorded
from cogvideox_sat.configuration.similar_names import nearest
from sgm.errors import UserError, shown

logger = logging.getLogger(__name__)

MODEL_KEYS = ("target", "params", "base_learning_rate")
# The first stage, whose sizes a configuration may refer to, may be described beside the model.
OTHER_MODEL_KEYS = ("first_stage_config",)

# Keys of `lightning.trainer`: for the engine, which runs its own optimizers, and for Lightning's `Trainer`.
ENGINE_KEYS = ("accumulate_grad_batches", "gradient_clip_val")
PLACE_KEYS = ("accelerator", "devices", "strategy")
TRAINER_KEYS = ("precision", "benchmark", "deterministic", "detect_anomaly", "sync_batchnorm", "profiler")
PRECISIONS = (
    *("16-mixed", "bf16-mixed", "32-true", "64-true", "bf16-true", "16-true", "transformer-engine"),
    *("transformer-engine-float16", "16", "bf16", "32", "64"),
)
FLAGS = ("benchmark", "detect_anomaly", "sync_batchnorm")
SET_ELSEWHERE = {
    "max_steps": "args.train_iters",
    "max_epochs": "args.train_iters",
    "val_check_interval": "args.eval_interval",
    "check_val_every_n_epoch": "args.eval_interval",
    "limit_val_batches": "args.eval_iters",
    "log_every_n_steps": "args.log_interval",
    "default_root_dir": "args.save",
    "logger": "args.tensorboard and args.wandb",
    "enable_checkpointing": "args.save_interval",
    "callbacks": "args (save_interval, eval_interval, log_interval)",
    "num_nodes": "torchrun's --nnodes",
}


def get_vae_training_args(command_line: Sequence[str] | None = None) -> VaeTrainingArguments:
    """Return the arguments of the command line and of the configuration files it names.

    Raises:
        UserError: a file is missing or malformed, or an argument or a key is unknown or has a wrong value.
        SystemExit: for `--help`.
    """
    given, config = read_command_line(
        VaeTrainingArguments, build_parser(), command_line, used=("model", "data"), exclusive=()
    )
    with config.sources.naming(given):
        sections = {name: config.get(name) or {} for name in ("args", "model", "data", "lightning")}
        sections["args"] = split_entries(sections["args"], given)
        values = check_section(VaeTrainingArguments, sections["args"]) | given
        values = with_located_inputs(values)
        check_model_section(sections["model"])
        if not isinstance(sections["data"].get("target"), str):
            raise UserError("data.target: missing; name the class of the data, data_video.SFTDataset")
        check_lightning_section(sections["lightning"])
        trainer = sections["lightning"].get("trainer") or {}
        values.setdefault("deterministic", trainer.get("deterministic") is True)
        if values["deterministic"] and trainer.get("benchmark"):
            raise UserError(
                "lightning.trainer: benchmark is on, with which cuDNN may choose other kernels in each run; leave it "
                "out, or train with --no-deterministic"
            )
        args = VaeTrainingArguments(
            **values,
            model_config=sections["model"],
            data_config=sections["data"],
            lightning_config=sections["lightning"],
            merged_config=recorded({**sections, "args": {**sections["args"], **values}}, values["deterministic"]),
            sources=config.sources,
        )
        check_run(args)
        check_seed_and_device(args)
        check_least(args, ("batch_size",))
        return args


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command that trains a VAE."""
    return parser_for(
        VaeTrainingArguments,
        "Train a video autoencoder on clips and images.",
        "python sat/train_vae.py --base configs/vae_3d.yaml --train_data data/train",
    )


def check_model_section(model: Mapping[str, Any]) -> None:
    """Check that the section has an engine, its parameters and a learning rate.

    Raises:
        UserError: one of them is missing or wrong.
    """
    if not isinstance(model.get("target"), str):
        raise UserError("model.target: missing; name the engine, vae_modules.autoencoder.VideoAutoencodingEngine")
    if not isinstance(model.get("params"), dict):
        raise UserError("model.params: missing; give encoder_config, decoder_config, loss_config and so on")
    rate = model.get("base_learning_rate")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or rate <= 0:
        raise UserError(f"model.base_learning_rate: got {shown(rate)}; expected a positive number such as 1.0e-4")
    for key in model:
        if key not in (*MODEL_KEYS, *OTHER_MODEL_KEYS):
            logger.warning("model.%s is not used%s", key, nearest(str(key), MODEL_KEYS, otherwise="", least=0.6))


def check_lightning_section(lightning: Mapping[str, Any]) -> None:
    """Check that all keys of the section are read, and have values that their readers take.

    Raises:
        UserError: a key is unknown, or its value is wrong.
    """
    if unknown := [key for key in lightning if key != "trainer"]:
        raise UserError(
            f"lightning: unknown key '{unknown[0]}'; expected trainer, with arguments of Lightning's Trainer"
        )
    trainer = lightning.get("trainer") or {}
    if not isinstance(trainer, dict):
        raise UserError(f"lightning.trainer: got {shown(trainer)}; expected keys and values")
    known = (*ENGINE_KEYS, *PLACE_KEYS, *TRAINER_KEYS)
    for key in trainer:
        if key in SET_ELSEWHERE:
            raise UserError(f"lightning.trainer: {key} is not read; set {SET_ELSEWHERE[key]} instead")
        if key not in known:
            hint = nearest(str(key), known, otherwise=f"; known are {', '.join(known)}")
            raise UserError(f"lightning.trainer: unknown key '{key}'{hint}")
    batches = trainer.get("accumulate_grad_batches", 1)
    if type(batches) is not int or batches < 1:
        raise UserError(
            f"lightning.trainer: accumulate_grad_batches: got {shown(batches)}; expected a whole number from 1"
        )
    clip = trainer.get("gradient_clip_val")
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, int | float) or clip <= 0):
        raise UserError(f"lightning.trainer: gradient_clip_val: got {shown(clip)}; expected a positive number, or none")
    accelerator = trainer.get("accelerator", "auto")
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise UserError(f"lightning.trainer: accelerator: got {shown(accelerator)}; it can be auto, cpu or gpu")
    deterministic = trainer.get("deterministic")
    if not (deterministic is None or isinstance(deterministic, bool) or deterministic == "warn"):
        raise UserError(f"lightning.trainer: deterministic: got {deterministic!r}; it can be true, false or warn")
    if (precision := trainer.get("precision")) is not None and str(precision) not in PRECISIONS:
        raise UserError(f"lightning.trainer: precision: got {shown(precision)}; it can be {', '.join(PRECISIONS)}")
    for name in FLAGS:
        if trainer.get(name) not in (None, True, False):
            raise UserError(f"lightning.trainer: {name}: got {shown(trainer[name])}; expected true or false")
    if trainer.get("profiler") not in (None, "simple", "advanced", "pytorch"):
        raise UserError(
            f"lightning.trainer: profiler: got {shown(trainer['profiler'])}; it can be simple, advanced or pytorch"
        )
    strategy = trainer.get("strategy", "auto")
    if strategy not in ("auto", "ddp", "ddp_find_unused_parameters_true"):
        raise UserError(f"lightning.trainer: strategy: got {shown(strategy)}; it can be auto or ddp")
