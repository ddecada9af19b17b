"""Check names of keys and types of values in all parts of the `deepspeed:` section."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from cogvideox_sat.configuration.deepspeed_keys import SECTION_KEYS, installed_keys
from cogvideox_sat.configuration.similar_names import nearest
from sgm.errors import UserError, shown

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
