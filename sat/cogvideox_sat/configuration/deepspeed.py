"""Check the `deepspeed:` section before DeepSpeed is imported.

DeepSpeed ignores most keys that it does not know, and fails at wrong values with assertions, minutes after the start.
Nothing here imports PyTorch or DeepSpeed, except in the case that `configuration.deepspeed_keys` describes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogvideox_sat.configuration.deepspeed_features import check_features
from cogvideox_sat.configuration.deepspeed_keys import KEYS
from cogvideox_sat.configuration.deepspeed_optimizers import check_optimizer, check_scheduler
from cogvideox_sat.configuration.deepspeed_spellings import as_numbers, with_modern_spelling, without_removed_keys
from cogvideox_sat.configuration.deepspeed_values import check_keys, check_number, check_types, checked_section
from cogvideox_sat.configuration.shared_arguments import PRECISIONS
from sgm.errors import UserError, shown

HIGHEST_STAGE = 3


def check_deepspeed_config(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `deepspeed:` section, checked, with today's spelling of older keys.

    Raises:
        UserError: a key is unknown, a value is of the wrong type or out of range, or values contradict each other.
    """
    if not section:
        raise UserError("the deepspeed section: missing; name configs/sft.yaml too, after the model's file")
    config = {key: value for key, value in as_numbers(section).items() if value is not None}
    config = without_removed_keys(with_modern_spelling(config))
    check_keys("", config, KEYS)
    check_types("", config)
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if name in config:
            check_number(name, config[name], least=1, whole=True)
    if "train_batch_size" not in config and "train_micro_batch_size_per_gpu" not in config:
        raise UserError("deepspeed: train_micro_batch_size_per_gpu: missing; give the clips of a process and step")
    if "gradient_clipping" in config:
        check_number("gradient_clipping", config["gradient_clipping"], least=0)
    check_precision(config)
    check_zero(config.get("zero_optimization", {}))
    check_optimizer(config)
    if "scheduler" in config:
        check_scheduler(config)
    checked_section(config, "activation_checkpointing")
    check_features(config)
    return config


def check_precision(config: Mapping[str, Any]) -> None:
    """Check that at most one of fp16 and bf16 is enabled, and loss scaling is in range.

    Raises:
        UserError: they are not.
    """
    enabled = []
    for name in PRECISIONS:
        value = checked_section(config, name).get("enabled", False)
        if type(value) is not bool:
            raise UserError(f"deepspeed: {name}.enabled: got {shown(value)}; expected true or false")
        enabled += [name] * value
    if len(enabled) > 1:
        raise UserError("deepspeed: fp16 and bf16 are both enabled; choose one")
    scale = config.get("fp16", {})
    for name, least, whole in (
        ("loss_scale", 0, False),
        ("initial_scale_power", 0, True),
        ("loss_scale_window", 1, True),
        ("hysteresis", 1, True),
        ("min_loss_scale", 0, False),
    ):
        if name in scale:
            check_number(f"fp16.{name}", scale[name], least, whole)


def check_zero(zero: Any) -> None:
    """Check the section `zero_optimization`, else raise UserError."""
    zero = checked_section({"zero_optimization": zero}, "zero_optimization")
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= HIGHEST_STAGE:
        raise UserError(f"deepspeed: zero_optimization.stage: got {shown(stage)}; it can be 0, 1, 2 or 3")
    for name, least_stage in (("offload_optimizer", 1), ("offload_param", HIGHEST_STAGE)):
        place = f"zero_optimization.{name}"
        offload = checked_section(zero, place)
        device = offload.get("device", "none")
        if device not in ("none", "cpu", "nvme"):
            raise UserError(f"deepspeed: {place}.device: got {shown(device)}; it can be none, cpu or nvme")
        if device != "none" and stage < least_stage:
            stages = "stage 3" if least_stage == HIGHEST_STAGE else "stage 1, 2 or 3"
            raise UserError(f"deepspeed: {place} needs {stages}; zero_optimization.stage is {stage}")
        if device == "nvme" and not Path(str(offload.get("nvme_path"))).is_dir():
            raise UserError(
                f"deepspeed: {place}.nvme_path: got {shown(offload.get('nvme_path'))}; expected an existing folder"
            )


def enabled_precision(config: Mapping[str, Any]) -> str | None:
    """Return the precision that a checked section enables, `fp16` or `bf16`; None if neither."""
    return next((name for name in PRECISIONS if config.get(name, {}).get("enabled")), None)


def with_precision(config: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checked section in which `fp16` and `bf16` are enabled where `chosen` is true."""
    return {**config, **{name: {**config.get(name, {}), "enabled": bool(chosen.get(name))} for name in PRECISIONS}}
