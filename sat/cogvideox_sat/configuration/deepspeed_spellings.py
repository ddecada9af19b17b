"""Bring older spellings of the `deepspeed:` section into today's."""

from collections.abc import Mapping
from typing import Any

from cogvideox_sat.configuration.argument_values import FLOAT
from sgm.errors import UserError

FP16_SCALING = frozenset({"loss_scale", "loss_scale_window", "hysteresis", "min_loss_scale", "initial_scale_power"})
# Features whose keys are an error in newer versions, even if they are turned off.
REMOVED_KEYS = {
    *("nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue", "elasticity"),
    *("sparse_attention", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"),
}


def as_numbers(node: Any) -> Any:
    """Return a section in which texts that are numbers are replaced by numbers.

    YAML reads 1e-8, which has no point, as a text.
    """
    if isinstance(node, Mapping):
        return {key: as_numbers(value) for key, value in node.items()}
    if isinstance(node, list):
        return [as_numbers(value) for value in node]
    if isinstance(node, str) and FLOAT.fullmatch(node):
        value = float(node)
        return int(value) if value.is_integer() else value
    return node


def with_modern_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """Return a section with today's spelling of bf16, loss scaling and offloading.

    DeepSpeed warns about the older spellings, or does not read them at all.
    """
    if "bfloat16" in config:
        config = {"bf16": config["bfloat16"], **config}
        del config["bfloat16"]
    scaling = {key: config[key] for key in FP16_SCALING & config.keys()}
    if scaling:  # released files have these keys beside `fp16:` instead of in it, where DeepSpeed does not read them
        config = {key: value for key, value in config.items() if key not in FP16_SCALING}
        config["fp16"] = {**scaling, **config.get("fp16", {})}
    zero = config.get("zero_optimization")
    if isinstance(zero, bool):
        zero = {"stage": int(zero)}
    if not isinstance(zero, dict):
        return config
    zero = dict(zero)
    pinned = zero.pop("cpu_offload_use_pin_memory", None)
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if zero.pop(old, None):
            zero.setdefault(new, {"device": "cpu"} | ({} if pinned is None else {"pin_memory": pinned}))
    return {**config, "zero_optimization": zero}


def without_removed_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return a section without removed features of DeepSpeed that are turned off.

    Raises:
        UserError: such a feature is turned on.
    """
    for key in REMOVED_KEYS & set(config):
        value = config[key]
        if value.get("enabled") if isinstance(value, dict) else value:
            raise UserError(f"deepspeed: {key} is a feature that DeepSpeed has removed; leave it out")
    return {key: value for key, value in config.items() if key not in REMOVED_KEYS}
