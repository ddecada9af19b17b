"""Set up DeepSpeed: network, optimizer and learning-rate schedule."""

import os
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from sat import mpu
from sat.mpu import RowParallelLinear
from sat.training.learning_rates import AnnealingLR
from torch import Tensor, nn
from torch.optim import Optimizer

from cogvideox_sat.configuration.deepspeed_features import complaint
from cogvideox_sat.configuration.deepspeed_optimizers import OUR_OPTIMIZERS
from cogvideox_sat.configuration.deepspeed_runtime import runtime_config
from cogvideox_sat.configuration.settings import LoopSettings
from cogvideox_sat.training import deepspeed_adapter
from cogvideox_sat.weights.stored_values import waiting_bytes
from sgm.config_places import ConfigError, Place, Sources
from sgm.config_values import is_own_file
from sgm.ema_adam import EmaAdam
from sgm.errors import UserError
from sgm.memory_errors import is_out_of_memory
from sgm.util import class_at, reporting

DEFAULT_BUCKET_SIZE = 500_000_000  # DeepSpeed's own, in elements


def initialize(
    network: nn.Module,
    deepspeed_config: Mapping[str, Any],
    settings: LoopSettings,
    dtype: torch.dtype,
    processes_per_clip: int = 1,
) -> deepspeed.DeepSpeedEngine:
    """Wrap `network`, some of whose parameters require gradients, in a DeepSpeed engine.

    Calling the engine calls the network. After `backward(loss)` and `step()`, `deepspeed_adapter.step_was_skipped`
    tells whether the gradients were not finite, so that the weights were not changed.

    Args:
        network: on its device, in its dtype; with ZeRO-3 its parameters may wait for their values, see
            `weights.stored_values`.
        deepspeed_config: the `deepspeed:` section, checked.
        settings: settings of the learning-rate schedule.
        dtype: float16, bfloat16 or float32.
        processes_per_clip: number of processes that share the tokens of each clip.

    Raises:
        UserError: DeepSpeed or the optimizer refuses its part of the configuration, the device does not support the
            dtype, or the version of DeepSpeed lacks something that training needs.
    """
    accelerator = get_accelerator()
    if dtype == torch.float16 and not accelerator.is_fp16_supported():
        device = "processor" if accelerator.device_name() == "cpu" else "device"
        raise UserError(f"deepspeed.fp16: this {device} does not train in float16; set bf16 or neither")
    deepspeed_adapter.sum_by_gloo()
    device = next(network.parameters()).device
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed takes the device from it
    config = runtime_config(deepspeed_config, dtype_name(dtype), processes_per_clip)
    learning_rate = config["optimizer"]["params"]["lr"]
    # SwissArmyTransformer's schedule multiplies a group's rate; DeepSpeed's schedules replace it.
    groups = parameter_groups(network, learning_rate if "scheduler" in config else 1.0)
    limit_buckets(config["zero_optimization"], sum(p.numel() for group in groups for p in group["params"]))
    is_plain = config["zero_optimization"]["stage"] == 0
    clipping = config.setdefault("gradient_clipping", 0.0)
    if is_plain:
        config["gradient_clipping"] = 0.0  # `clip_or_skip` clips before the step
    try:
        optimizer = build_optimizer(config, groups, settings.sources)
        if waiting_bytes(network):
            divide(network, config, dtype)
        engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            model_parameters=None if optimizer else groups,
            lr_scheduler=None if "scheduler" in config else partial(Annealing, settings, learning_rate),
            config=config,
            mpu=mpu,
            dist_init_required=False,
        )
    except Exception as error:  # DeepSpeed reports errors in its configuration by exceptions of any kind
        if isinstance(error, UserError) or is_out_of_memory(error) or not raised_in_library(error):
            raise
        line = complaint(error, deepspeed_config)
        file = settings.sources.file_of(("deepspeed",))
        raise ConfigError(f"{file}: {line}" if file else line) from error
    deepspeed_adapter.check(engine)
    if is_plain:
        if mpu.get_data_parallel_world_size() == 1:
            deepspeed_adapter.sum_no_gradients(engine)
        engine.optimizer.register_step_pre_hook(partial(clip_or_skip, engine, clipping))
    else:
        deepspeed_adapter.leave_out_steps(engine)  # the trainer counts skipped steps
    sum_partial_gradients(network)
    return engine


def divide(network: nn.Module, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Divide parameters among data-parallel processes.

    Each process reads its part of those parameters that wait for their values.

    Args:
        config: the configuration for DeepSpeed.
    """
    deepspeed_adapter.sum_by_gloo()
    group = mpu.get_data_parallel_group()
    deepspeed_adapter.DividedFromFiles(network, group, dtype=dtype, config_dict_or_path=config, mpu=mpu)


def raised_in_library(error: Exception) -> bool:
    """Return whether an error comes from a library that `initialize` calls.

    Otherwise, it comes from a function of this project.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.name for frame in frames if is_own_file(frame.filename)]
    return own[-1:] == [initialize.__name__]


def dtype_name(dtype: torch.dtype) -> str:
    """Return DeepSpeed's name of a dtype."""
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def limit_buckets(zero: dict[str, Any], trained: int) -> None:
    """Limit ZeRO's gradient buffers to the number of gradients.

    For an adapter of megabytes, larger buffers would waste gigabytes.
    """
    zero["reduce_bucket_size"] = min(int(zero.get("reduce_bucket_size", DEFAULT_BUCKET_SIZE)), max(trained, 1))


# Optimizer and schedule


def parameter_groups(network: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """Return the trained parameters in two groups: with and without weight decay.

    Biases and norms have no weight decay.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                # DeepSpeed's norms read this attribute.
                parameter.model_parallel = getattr(parameter, "model_parallel", False)
                (others if name == "bias" or isinstance(module, nn.LayerNorm) else decayed).append(parameter)
    groups = [{"params": decayed, "lr": learning_rate}, {"params": others, "lr": learning_rate, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    config: dict[str, Any], groups: list[dict[str, Any]], sources: Sources | None = None
) -> Optimizer | None:
    """Return the optimizer that `config` names by import path, and remove it from `config`.

    None: DeepSpeed knows the name.
    """
    section = config["optimizer"]
    if "." not in section["type"]:
        if section["type"].lower() in ("adam", "adamw") and groups[0]["params"][0].device.type == "cpu":
            section["params"].setdefault("torch_adam", True)  # otherwise, DeepSpeed silently compiles an extension
        return None
    del config["optimizer"]
    root = Place(("deepspeed",), config, sources)
    place = Place(("deepspeed", "optimizer"), section, sources, building=True)
    if section["type"] in OUR_OPTIMIZERS:  # their parameters are already checked
        return EmaAdam(groups, **section["params"])
    kind = class_at(section["type"], place.below("type"), "optimizer")
    with reporting(place.below("params"), root):
        return kind(groups, **section["params"])


class Annealing(AnnealingLR):
    """SwissArmyTransformer's schedule: a start at 5 %, a linear rise, then the decay.

    The start at 5 % lasts `auto_warmup_steps`. Steps count from 1, as in SwissArmyTransformer. Two differences: a
    linear decay stops at zero, and `load_state_dict` restores the step, while rates and lengths come from the current
    configuration.
    """

    def __init__(self, settings: LoopSettings, learning_rate: float, optimizer: Optimizer):
        steps = settings.lr_decay_iters or settings.train_iters
        super().__init__(
            optimizer,
            start_lr=learning_rate,
            warmup_iter=max(settings.warmup * steps, 1e-9),  # not zero, because the schedule divides by it
            num_iters=steps,
            decay_style=settings.lr_decay_style,
            last_iter=0,
            decay_ratio=settings.lr_decay_ratio,
            auto_warmup_steps=settings.auto_warmup_steps,
        )

    def get_lr(self) -> float:
        """Return the learning rate of the current step, at least 0."""
        return max(super().get_lr(), 0.0)

    def load_state_dict(self, sd: dict[str, Any]) -> None:
        """Continue at the step of a result of `state_dict`."""
        self.step(sd["num_iters"])


# Gradients


def clip_or_skip(engine: deepspeed.DeepSpeedEngine, clipping: float, optimizer: Optimizer, *_: Any) -> None:
    """Clip gradients, or skip the step if they are not finite, before a step without ZeRO.

    ZeRO's optimizers do this themselves. The engine is told the norm, and whether the step is skipped.

    Args:
        clipping: the largest norm; 0: no clipping.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = gradient_norm(parameters)
    skip = not torch.isfinite(norm)
    deepspeed_adapter.tell_norm(engine, norm, skip)
    if skip:
        for parameter in parameters:
            parameter.grad = None
    elif clipping > 0:
        torch._foreach_mul_([p.grad for p in parameters], (clipping / (norm + 1e-6)).clamp(max=1.0))


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Return the gradient norm over all model-parallel processes, a float32 scalar.

    Parameters of which every process has a copy count once.
    """
    counted = [p.grad for p in parameters if getattr(p, "model_parallel", False) or mpu.get_model_parallel_rank() == 0]
    norms = torch._foreach_norm(counted, dtype=torch.float32)
    square = torch.stack(norms).square().sum() if norms else torch.zeros((), device=parameters[0].device)
    if mpu.get_model_parallel_world_size() > 1:
        dist.all_reduce(square, group=mpu.get_model_parallel_group())
    return square.sqrt()


def sum_partial_gradients(network: nn.Module) -> None:
    """Sum gradients of which each model-parallel process computes only a part.

    All processes hold these parameters: the norms of queries and keys, which see only the process's own heads, and
    biases that are added in equal parts.
    """
    if mpu.get_model_parallel_world_size() == 1:
        return
    group = mpu.get_model_parallel_group()
    for name, module in network.named_modules():
        partial_ = []
        if isinstance(module, RowParallelLinear):
            partial_ = [module.bias]
        elif "query_layernorm_list." in name or "key_layernorm_list." in name:
            partial_ = module.parameters()
        for parameter in partial_:
            if parameter is not None and parameter.requires_grad:
                parameter.register_hook(_summed_over(group))


def _summed_over(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    def sum_(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=group)
        return gradient

    return sum_
