"""Read and check the arguments of the training command.

An argument is a field of `TrainingArguments` in `argument_lists`. Keys of `SamplingArguments` may stand beside them in
one configuration. Nothing here imports PyTorch.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogvideox_sat.configuration.argument_fields import argument_fields
from cogvideox_sat.configuration.argument_limits import check_common, check_least, check_run, check_shares
from cogvideox_sat.configuration.argument_lists import IGNORED_KEYS, SamplingArguments, TrainingArguments
from cogvideox_sat.configuration.argument_parser import parser_for
from cogvideox_sat.configuration.argument_reading import read_command_line, read_configuration, with_located_inputs
from cogvideox_sat.configuration.argument_values import check_section, given_values
from cogvideox_sat.configuration.data_mixing import split_entries
from cogvideox_sat.configuration.deepspeed import check_deepspeed_config, enabled_precision, with_precision
from cogvideox_sat.configuration.determinism import recorded
from cogvideox_sat.configuration.files import MergedConfig
from cogvideox_sat.configuration.model_section import has_adapter, unused_model_keys
from cogvideox_sat.configuration.recomputation import check_layers, recomputation_mode
from cogvideox_sat.configuration.shared_arguments import PRECISIONS
from sgm.errors import UserError

logger = logging.getLogger(__name__)

TRAINED_PARTS = ("network_config", "denoiser_config", "loss_fn_config", "conditioner_config", "first_stage_config")
# Arguments of SwissArmyTransformer's trainer that are set only in the `deepspeed:` section here.
SET_ELSEWHERE = {
    "lr": "optimizer.params.lr",
    "weight_decay": "optimizer.params.weight_decay",
    "zero_stage": "zero_optimization.stage",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "train_micro_batch_size_per_gpu",
    "clip_grad": "gradient_clipping",
}


def get_training_args(command_line: Sequence[str] | None = None) -> TrainingArguments:
    """Return the arguments of the command line and of the configuration files it names.

    Raises:
        UserError: a file is missing or malformed, or an argument or a key of DeepSpeed is unknown or has a wrong value.
        SystemExit: for `--help`.
    """
    given, config = read_command_line(
        TrainingArguments,
        build_parser(),
        command_line,
        used=("model", "data"),
        exclusive=(PRECISIONS,),
        ignored=IGNORED_KEYS,
        elsewhere={name: f"deepspeed.{place}" for name, place in SET_ELSEWHERE.items()},
    )
    return training_arguments_of(given, config)


def training_arguments_from_names(
    base: Sequence[str | Path], values: Mapping[str, Any], settings: Mapping[str, Any]
) -> TrainingArguments:
    """Return the training arguments that a program gives by name.

    Args:
        base: configuration files.
        values: arguments by name, as on the command line.
        settings: keys that are set on top of the files, see `single_keys`.

    Raises:
        UserError: as `get_training_args`.
    """
    for name, place in SET_ELSEWHERE.items():
        if name in values:
            raise UserError(f"{name} is not an argument; give set={{'deepspeed.{place}': …}}")
    named: dict[str, Any] = {**given_values(TrainingArguments, values), "base": list(base)}
    config = read_configuration(named, settings, TrainingArguments, used=("model", "data"), exclusive=(PRECISIONS,))
    return training_arguments_of(named, config)


def training_arguments_of(given: dict[str, Any], config: MergedConfig) -> TrainingArguments:
    """Return the arguments of a merged configuration; those in `given` take precedence.

    Raises:
        UserError: as `get_training_args`.
    """
    with config.sources.naming(given):
        sections = {name: config.get(name) or {} for name in ("args", "model", "data", "deepspeed")}
        sections["args"] = split_entries(sections["args"], given)
        values = check_args_section(sections["args"])
        for sentence in unused_model_keys(sections["model"], TRAINED_PARTS):
            logger.warning(sentence)
        if not isinstance(sections["data"].get("target"), str):
            raise UserError("data.target: missing; name configs/sft.yaml too, after the model's file")
        sections["deepspeed"] = check_deepspeed_config(sections["deepspeed"])
        if enabled := enabled_precision(sections["deepspeed"]):
            values |= {name: name == enabled for name in PRECISIONS}
        values = with_located_inputs(values | given)
        args = TrainingArguments(
            **values,
            model_config=sections["model"],
            data_config=sections["data"],
            deepspeed_config=with_precision(sections["deepspeed"], values),
            sources=config.sources,
        )
        check_values(args)
        merged = {**sections, "args": {**sections["args"], **values}, "deepspeed": args.deepspeed_config}
        args.merged_config = recorded(merged, args.deterministic)
        return args


def complete(args: TrainingArguments) -> TrainingArguments:
    """Return a program's arguments, checked and completed like those of the command.

    Raises:
        UserError: an argument or a key of DeepSpeed is unknown or has a wrong value.
    """
    section = check_deepspeed_config(args.deepspeed_config)
    enabled = enabled_precision(section)
    precision: dict[str, Any] = {name: name == enabled if enabled else getattr(args, name) for name in PRECISIONS}
    args = replace(args, **precision, deepspeed_config=with_precision(section, precision))
    check_values(args)
    if not args.merged_config:
        values = {name: getattr(args, name) for name in argument_fields(TrainingArguments)}
        args.merged_config = {
            "args": {name: value for name, value in values.items() if value not in (None, [])},
            "model": args.model_config,
            "data": args.data_config,
            "deepspeed": args.deepspeed_config,
        }
    return args


def saves_all(args: TrainingArguments) -> bool:
    """Return whether checkpoints hold the whole network, rather than only an adapter."""
    return args.save_full or not has_adapter(args.model_config)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command that fine-tunes."""
    return parser_for(
        TrainingArguments,
        "Fine-tune a model on video clips with captions.",
        "python sat/train_video.py --base configs/cogvideox_2b_lora.yaml configs/sft.yaml --seed 42",
        IGNORED_KEYS,
    )


def check_args_section(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `args:` section, checked, without arguments of other commands.

    Arguments of sampling and of SwissArmyTransformer's trainer are left out.

    Raises:
        UserError: a key is unknown, belongs to another section, or has a wrong value.
    """
    known = argument_fields(TrainingArguments)
    for name, place in SET_ELSEWHERE.items():
        if section.get(name) is not None:
            raise UserError(f"args: {name} is not read; set deepspeed.{place} instead")
    check_split(section.get("split"))
    if ignored := [name for name in section if name in IGNORED_KEYS]:
        logger.info("args: not used here: %s", ", ".join(ignored))
    return check_section(
        TrainingArguments, section, foreign={*argument_fields(SamplingArguments), *IGNORED_KEYS} - {*known}
    )


def check_split(split: Any) -> None:
    """Check that `split:` keeps all training data for training, else raise UserError."""
    if split is None:
        return
    parts = [part.strip() for part in str(split).split(",")]
    if any(part.strip("0.") for part in parts[1:]):
        raise UserError(f"args: split: got {split}; training data is not split; name validation data as valid_data")


def check_values(args: TrainingArguments) -> None:
    """Check the values of the arguments by themselves, else raise UserError.

    Values that depend on the model, the data or DeepSpeed's section are checked later.
    """
    check_common(args)
    check_run(args)
    check_least(args, ("lr_decay_iters", "max_skipped_steps", "sequence_parallel_size"))
    check_least(args, ("auto_warmup_steps", "checkpoint_skip_layers"), least=0)
    check_recomputation(args)
    check_shares(args, ("warmup",))
    if not 0 < args.lr_decay_ratio <= 1:
        raise UserError(f"lr_decay_ratio: got {args.lr_decay_ratio}; expected a share, above 0 and up to 1")
    if not (args.load or args.force_train or args.inspect_data):
        raise UserError("load: missing; name the checkpoint to start from, or give --force_train to start at random")


def check_recomputation(args: TrainingArguments) -> None:
    """Check that the layers exist that the arguments about recomputation name.

    The values in the model's file are checked with the model.

    Raises:
        UserError: a layer does not exist.
    """
    params = (args.model_config.get("network_config") or {}).get("params") or {}
    layers = params.get("num_layers")
    if args.checkpoint_activations is not None:
        mode = recomputation_mode("checkpoint_activations", args.checkpoint_activations)
        if type(layers) is int:
            check_layers("checkpoint_activations", mode, layers)
    skipped = args.checkpoint_skip_layers
    if skipped is not None and type(layers) is int and skipped > layers:
        raise UserError(f"checkpoint_skip_layers: got {skipped}; the network has {layers} layers")
