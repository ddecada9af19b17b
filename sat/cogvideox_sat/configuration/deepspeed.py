"""Check the `deepspeed:` section before DeepSpeed is imported, and complete it.

DeepSpeed ignores most keys that it does not know, and fails at wrong values with assertions, minutes after the start.
Nothing here imports PyTorch or DeepSpeed, except in the case that `configuration.deepspeed_keys` describes.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cogvideox_sat.configuration.argument_values import FLOAT
from cogvideox_sat.configuration.deepspeed_features import check_features
from cogvideox_sat.configuration.deepspeed_keys import KEYS, SECTION_KEYS, installed_keys
from cogvideox_sat.configuration.shared_arguments import PRECISIONS
from cogvideox_sat.configuration.similar_names import nearest
from cogvideox_sat.configuration.targets import why_target_fails
from sgm.errors import UserError, shown

OUR_OPTIMIZERS = ("sat.ops.FusedEmaAdam", "ema_adam.EmaAdam")  # two names of one class
HIGHEST_STAGE = 3

FP16_SCALING = frozenset({"loss_scale", "loss_scale_window", "hysteresis", "min_loss_scale", "initial_scale_power"})
# Values that DeepSpeed reads without checking their type, or checks with an assertion minutes after the start.
FLAGS = {
    *("contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions"),
    *("overlap_comm", "load_from_fp32_weights", "elastic_checkpoint", "round_robin_gradients", "pin_memory"),
    *("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save", "auto_cast"),
    *("stage3_use_all_reduce_for_fetch_params", "ignore_unused_parameters", "legacy_stage1", "fast_init"),
    *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
    *("memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings"),
    *("pipeline_read", "pipeline_write", "consecutive_hysteresis", "fp16_master_weights_and_grads", "enabled"),
    *("immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads", "bf16_optimizer_states"),
    *("partition_activations", "contiguous_memory_optimization", "cpu_checkpointing", "profile", "legacy_fusion"),
    *("synchronize_checkpoint_boundary", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("prescale_gradients", "disable_allgather", "wall_clock_breakdown", "memory_breakdown", "dump_state"),
    *("dataloader_drop_last", "disable_python_gc", "compute_grad_norm", "enable_sanity_checks", "super_offload"),
}
COUNTS = {
    *("reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size", "buffer_count"),
    *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters"),
    *("stage3_max_reuse_distance", "stage3_module_granularity_threshold", "buffer_size", "max_in_cpu"),
    *("zero_hpz_partition_size", "steps_per_print", "allgather_size", "vocabulary_size", "sequence_parallel_size"),
    "number_checkpoints",
}
SHARES = {"ratio", "cpuadam_cores_perc"}
LARGEST_COUNT = 10**15
# Features whose keys are an error in newer versions, even if they are turned off.
REMOVED_KEYS = {
    *("nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue", "elasticity"),
    *("sparse_attention", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"),
}
WHOLE_MATRICES = "sgm.muon.Muon"
ADAM_PARAMS = {"lr", "betas", "eps", "weight_decay", "bias_correction", "amsgrad", "adam_w_mode", "set_grad_none"}
TORCH_ADAM_PARAMS = {"torch_adam", "fp32_optimizer_states", "foreach", "fused", "maximize", "capturable"}
ADAM_FLAGS = {"bias_correction", "amsgrad", "adam_w_mode", "set_grad_none", *TORCH_ADAM_PARAMS}
OPTIMIZER_PARAMS = {
    # `use_num_upates` is SwissArmyTransformer's spelling.
    **{name: ADAM_PARAMS | {"ema_decay", "use_num_upates", "use_num_updates"} for name in OUR_OPTIMIZERS},
    WHOLE_MATRICES: {"lr", "momentum", "adam_lr_factor", "betas", "eps", "weight_decay", "ema_decay"},
    "adam": ADAM_PARAMS | TORCH_ADAM_PARAMS,
    "adamw": ADAM_PARAMS | TORCH_ADAM_PARAMS,
}
# DeepSpeed accepts its own names in upper and lower case.
DEEPSPEED_OPTIMIZERS = {"adam", "adamw", "adagrad", "lamb", "lion", "muon", "muadam", "muadamw", "musgd"}
TORCH_OPTIMIZERS = {"Adadelta", "Adafactor", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"}
DEEPSPEED_SCHEDULERS = {"LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"}


# ---------------------------------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------------------------------


def check_deepspeed_config(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `deepspeed:` section, checked, with today's spelling of older keys.

    Raises:
        UserError: a key is unknown, a value is of the wrong type or out of range, or values contradict each other.
    """
    if not section:
        raise UserError("the deepspeed section is missing; name configs/sft.yaml too, after the model's file")
    config = {key: value for key, value in as_numbers(section).items() if value is not None}
    config = without_removed_keys(with_modern_spelling(config))
    check_keys("", config, KEYS)
    check_types("", config)
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if name in config:
            check_number(name, config[name], least=1, whole=True)
    if "train_batch_size" not in config and "train_micro_batch_size_per_gpu" not in config:
        raise UserError("deepspeed: train_micro_batch_size_per_gpu is missing; give the clips of a process and step")
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


def enabled_precision(config: Mapping[str, Any]) -> str | None:
    """Return the precision that a checked section enables, `fp16` or `bf16`; None if neither."""
    return next((name for name in PRECISIONS if config.get(name, {}).get("enabled")), None)


def with_precision(config: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checked section in which `fp16` and `bf16` are enabled where `chosen` is true."""
    return {**config, **{name: {**config.get(name, {}), "enabled": bool(chosen.get(name))} for name in PRECISIONS}}


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


def check_keys(place: str, section: Mapping[str, Any], known: Collection[str]) -> None:
    """Check that we or the installed DeepSpeed know all keys, else raise UserError.

    Args:
        place: the dotted key of the section.
    """
    elsewhere = {name for keys in SECTION_KEYS.values() for name in keys}
    for key in section:
        if key not in known and (key in elsewhere or key not in installed_keys(place)):
            where = f"deepspeed.{place}" if place else "deepspeed"
            raise UserError(f"{where}: unknown key '{key}'{nearest(str(key), sorted(known), otherwise='')}")


def checked_section(config: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """Return the section at the last part of `place` in `config`; {} if it is missing.

    Raises:
        UserError: the section is not a mapping, or a key is unknown.
    """
    section = config.get(place.rpartition(".")[2])
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise UserError(f"deepspeed: {place}: got {section!r}; expected keys and values")
    check_keys(place, section, SECTION_KEYS[place])
    return section


def check_types(place: str, section: Mapping[str, Any]) -> None:
    """Check the types of all values in a part of the section, else raise UserError."""
    for key, value in section.items():
        name = f"{place}.{key}" if place else str(key)
        if value is None or value == "auto":
            continue
        if key in FLAGS and type(value) is not bool and value not in (0, 1):
            raise UserError(f"deepspeed: {name}: got {shown(value)}; expected true or false")
        if key in COUNTS and (type(value) not in (int, float) or not 0 <= value <= LARGEST_COUNT):
            raise UserError(f"deepspeed: {name}: got {shown(value)}; expected a number from 0 to {LARGEST_COUNT:.0e}")
        if key in SHARES and (type(value) not in (int, float) or not 0 <= value <= 1):
            raise UserError(f"deepspeed: {name}: got {shown(value)}; expected a share, from 0 to 1")
        if name in SECTION_KEYS and isinstance(value, Mapping):
            check_types(name, value)


def check_number(name: str, value: Any, least: float, whole: bool = False, below: float = math.inf) -> None:
    """Check that least <= value < below, else raise UserError."""
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not least <= value < below:
        kind = "a whole number" if whole else "a number"
        limit = "" if below == math.inf else f" and below {below}"
        raise UserError(f"deepspeed: {name}: got {shown(value)}; expected {kind}, at least {least}{limit}")


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


def type_and_params(config: Mapping[str, Any], place: str) -> tuple[str, Mapping[str, Any]]:
    """Return the type and the parameters of the optimizer or scheduler at `place`.

    Raises:
        UserError: the section is not a mapping or has an unknown key, or one of the two is missing.
    """
    section = checked_section(config, place)
    name, params = section.get("type"), section.get("params")
    if not isinstance(name, str) or not name:
        raise UserError(f"deepspeed: {place}.type: got {shown(name)}; expected a name")
    if not isinstance(params, Mapping):
        raise UserError(f"deepspeed: {place}.params: got {shown(params)}; expected keys and values")
    return name, params


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Check that the scheduler is one of DeepSpeed's or PyTorch's, else raise UserError."""
    name, _ = type_and_params(config, "scheduler")
    if name not in DEEPSPEED_SCHEDULERS and why_target_fails(f"torch.optim.lr_scheduler.{name}"):
        hint = nearest(name, sorted(DEEPSPEED_SCHEDULERS), otherwise="")
        raise UserError(f"deepspeed: unknown scheduler.type '{name}'{hint}")


def check_optimizer(config: Mapping[str, Any]) -> None:
    """Check the type and the parameters of the optimizer, else raise UserError."""
    if "optimizer" not in config:
        raise UserError(f"deepspeed: optimizer is missing; give its type, such as {OUR_OPTIMIZERS[0]}, and params.lr")
    name, params = type_and_params(config, "optimizer")
    if "." in name:
        if problem := why_target_fails(name):
            raise UserError(f"deepspeed: optimizer.type: {name}: {problem}")
    elif name.lower() not in DEEPSPEED_OPTIMIZERS and name not in TORCH_OPTIMIZERS:
        hint = nearest(name, sorted(DEEPSPEED_OPTIMIZERS | TORCH_OPTIMIZERS), otherwise="; give an import path")
        raise UserError(f"deepspeed: unknown optimizer.type '{name}'{hint}")
    known = OPTIMIZER_PARAMS.get(name if "." in name else name.lower(), params)
    for key in params:
        if key not in known:
            hint = nearest(str(key), sorted(known), otherwise="")
            raise UserError(f"deepspeed.optimizer.params: unknown key '{key}'{hint}")
    if "lr" not in params:
        raise UserError("deepspeed: optimizer.params.lr is missing; give the learning rate")
    check_number("optimizer.params.lr", params["lr"], least=0)
    for key in ("eps", "weight_decay"):
        if key in params:
            check_number(f"optimizer.params.{key}", params[key], least=0)
    if "ema_decay" in params:
        check_number("optimizer.params.ema_decay", params["ema_decay"], least=0, below=1)
    if known is not params:
        for key in ADAM_FLAGS & params.keys():
            if params[key] not in (None, True, False):
                raise UserError(f"deepspeed: optimizer.params.{key}: got {shown(params[key])}; expected true or false")
    if "betas" in params:
        betas = params["betas"]
        if not isinstance(betas, list) or len(betas) < 2 or (known is not params and len(betas) > 2):
            raise UserError(f"deepspeed: optimizer.params.betas: got {shown(betas)}; expected two numbers")
        for beta in betas:
            check_number("optimizer.params.betas", beta, least=0, below=1)


# ---------------------------------------------------------------------------------------------------------------------
# Completing
# ---------------------------------------------------------------------------------------------------------------------


class BatchSizes(NamedTuple):
    """Batch sizes of a run, in clips or forward passes.

    Attributes:
        micro: clips in one forward pass of one process.
        accumulation: forward passes of one process in a step.
        total: clips of all processes in a step.
    """

    micro: int
    accumulation: int
    total: int


def batch_sizes(config: Mapping[str, Any], data_parallel_size: int) -> BatchSizes:
    """Return the batch sizes of a checked section, computing those that are missing.

    total = micro * accumulation * data_parallel_size; accumulation is 1 if only one of the three is given.

    Raises:
        UserError: the batch sizes contradict each other.
    """
    total = config.get("train_batch_size")
    micro = config.get("train_micro_batch_size_per_gpu")
    accumulation = config.get("gradient_accumulation_steps")
    if total is not None and micro is not None and accumulation is None:
        accumulation = total // (micro * data_parallel_size)
    accumulation = 1 if accumulation is None else accumulation
    if micro is None:
        micro = config["train_batch_size"] // (accumulation * data_parallel_size)
    product = micro * accumulation * data_parallel_size
    if total is not None and total != product:
        raise UserError(
            f"deepspeed: train_batch_size {total} is not a multiple of train_micro_batch_size_per_gpu {micro} x "
            f"gradient_accumulation_steps {accumulation} x {data_parallel_size} data-parallel processes; "
            "leave it out to have it computed"
        )
    return BatchSizes(micro, accumulation, product)


def runtime_config(config: Mapping[str, Any], precision: str, processes_per_clip: int = 1) -> dict[str, Any]:
    """Return the `config` for `deepspeed.initialize`, made from a checked section.

    The section gets the precision of the run and allows optimizers that are not DeepSpeed's. Half precision without
    ZeRO becomes ZeRO stage 1, which computes the same and keeps its float32 weights where the higher stages do.

    Args:
        precision: `fp16`, `bf16` or `fp32`.
        processes_per_clip: the number of processes that share a clip; DeepSpeed counts each of them as having a batch
            of its own.

    Raises:
        UserError: the optimizer needs whole matrices, but ZeRO flattens them.
    """
    zero = dict(config.get("zero_optimization", {}))
    zero["stage"] = max(zero.get("stage", 0), int(precision in PRECISIONS))
    if zero["stage"] and config["optimizer"]["type"] == WHOLE_MATRICES:
        raise UserError(
            f"deepspeed: {WHOLE_MATRICES} needs whole matrices, but in {precision} this is ZeRO stage {zero['stage']}, "
            "which flattens them; train in float32 with zero_optimization.stage 0, or with another optimizer"
        )
    total = (
        {"train_batch_size": config["train_batch_size"] * processes_per_clip} if "train_batch_size" in config else {}
    )
    return {
        **with_precision(config, {precision: True}),
        **total,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
