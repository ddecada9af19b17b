"""List the keys of the `deepspeed:` section, by the part that holds them.

Nothing here imports PyTorch or DeepSpeed, except if the installed DeepSpeed has another version than these tables: then
keys that the tables lack are looked up in DeepSpeed itself.
"""

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

# Keys that this version reads, at the top of the section (`KEYS`) and in the parts whose keys are checked.
VERSION = "0.19.8"
KEYS = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print"),
    *("optimizer", "scheduler", "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("fp16", "bf16", "bfloat16", "torch_autocast", "data_types", "communication_data_type", "log_level"),
    *("seq_parallel_communication_data_type", "prescale_gradients", "gradient_predivide_factor", "gradient_clipping"),
    *("gradient_allreduce_op", "disable_allgather", "disable_python_gc", "managed_gradient_accumulation"),
    *("activation_checkpointing", "wall_clock_breakdown", "memory_breakdown", "dump_state", "flops_profiler"),
    *("tensorboard", "wandb", "csv_monitor", "comet", "comms_logger", "timers", "autotuning", "aio", "compile"),
    *("checkpoint", "datastates_ckpt", "data_efficiency", "dataloader_drop_last", "vocabulary_size", "pipeline"),
    *("hybrid_engine", "weight_quantization", "tensor_parallel", "expert_parallel", "sequence_parallel_size"),
    *("use_data_before_expert_parallelism", "allgather_size"),
}
SECTION_KEYS = {
    "zero_optimization": {
        *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
        *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm"),
        *("load_from_fp32_weights", "elastic_checkpoint", "offload_param", "offload_optimizer", "zenflow"),
        *("sub_group_size", "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "leaf_module"),
        *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
        *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_module_granularity_threshold"),
        *("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"),
        *("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "ignore_unused_parameters"),
        *("legacy_stage1", "round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size"),
        *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
        *("memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply"),
        *("log_trace_cache_warnings", "enable_sanity_checks", "save_muon_momentum_buffer_in_memory"),
        # Short forms of the keys that begin with `stage3_`.
        *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters"),
        *("max_reuse_distance", "module_granularity_threshold", "gather_16bit_weights_on_model_save"),
        *("use_all_reduce_for_fetch_params", "allgather_sequential"),
    },
    "zero_optimization.offload_optimizer": {
        *("device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init"),
        *("ratio", "super_offload", "cpuadam_cores_perc"),
    },
    "zero_optimization.offload_param": {
        *("device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"),
    },
    "fp16": {
        *("enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis"),
        *("consecutive_hysteresis", "min_loss_scale", "fp16_master_weights_and_grads"),
    },
    "bf16": {
        *("enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads"),
        "bf16_optimizer_states",
    },
    "optimizer": {"type", "params", "legacy_fusion"},
    "scheduler": {"type", "params"},
    "activation_checkpointing": {
        *("partition_activations", "number_checkpoints", "contiguous_memory_optimization", "cpu_checkpointing"),
        *("synchronize_checkpoint_boundary", "profile"),
    },
}
# Where DeepSpeed itself lists its keys: as fields of its configuration models, and as constants.
MODELS = {
    "zero_optimization": "deepspeed.runtime.zero.config.DeepSpeedZeroConfig",
    "zero_optimization.offload_optimizer": "deepspeed.runtime.zero.offload_config.DeepSpeedZeroOffloadOptimizerConfig",
    "zero_optimization.offload_param": "deepspeed.runtime.zero.offload_config.DeepSpeedZeroOffloadParamConfig",
    "fp16": "deepspeed.runtime.precision_config.DeepSpeedFP16Config",
    "bf16": "deepspeed.runtime.precision_config.DeepSpeedBF16Config",
}
CONSTANTS = {"activation_checkpointing": "deepspeed.runtime.activation_checkpointing.config"}
OTHER_CONSTANTS = "deepspeed.runtime.constants"  # for all other parts, and for older versions without such models


@cache
def installed_keys(place: str) -> frozenset[str]:
    """Return the keys of a part of the section that the installed DeepSpeed reads.

    The result is empty if the installed DeepSpeed has the version of the tables here, or is not installed.

    Args:
        place: "" or a key of `SECTION_KEYS`.
    """
    try:
        return frozenset() if version("deepspeed") == VERSION else told_keys(place)
    except PackageNotFoundError:
        return frozenset()


def told_keys(place: str) -> frozenset[str]:
    """Return the keys of a part that the installed DeepSpeed reads, whatever its version.

    This imports DeepSpeed and PyTorch.
    """
    if place in MODELS:
        module, _, name = MODELS[place].rpartition(".")
        if fields := getattr(_imported(module), name, None):
            fields = fields.model_fields
            return frozenset(fields) | {field.alias for field in fields.values() if field.alias}
    constants = vars(_imported(CONSTANTS.get(place, OTHER_CONSTANTS)) or object)
    return frozenset(value for name, value in constants.items() if name.isupper() and isinstance(value, str))


def _imported(module: str) -> object | None:
    try:
        return import_module(module)
    except Exception:  # libraries that do not fit each other raise errors of any kind; the trainer reports them later
        return None
