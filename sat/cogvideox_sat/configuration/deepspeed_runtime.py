"""Complete a checked `deepspeed:` section for a run: batch sizes and precision.

Nothing here imports PyTorch or DeepSpeed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from cogvideox_sat.configuration.deepspeed import with_precision
from cogvideox_sat.configuration.deepspeed_optimizers import WHOLE_MATRICES
from cogvideox_sat.configuration.shared_arguments import PRECISIONS
from sgm.errors import UserError


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
