"""All undocumented parts of DeepSpeed that training uses.

These are attributes of engines, of ZeRO's optimizers, of loss scales and of partitioned parameters. No other module of
this project uses them. `check` compares them with the installed version.
"""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import Tensor, nn
from torch.optim import Optimizer

from cogvideox_sat.weights.stored_values import forget_value, value_of
from sgm.errors import UserError

CHECKED = "0.19.8"  # the version of DeepSpeed with which this module was tested
SUMS = "deepspeed_shm_comm"  # DeepSpeed's C++ extension for sums between processes
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
LIMIT = "raise_error_at_min_scale"  # also an attribute of dynamic loss scales
LINKING = ("_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state")
# The attributes in use, by their owner. ZeRO's optimizers are listed by their classes, of which an engine has one;
# other classes are not checked.
ENGINE = (
    *("optimizer", "basic_optimizer", "zero_optimization", "zero_optimization_partition_weights"),
    *("allreduce_gradients", "_global_grad_norm"),
)
OPTIMIZERS = {
    "DeepSpeedZeroOptimizer": ("overflow", "loss_scaler", "cur_scale", "check_grad_overflow", *LINKING),
    "DeepSpeedZeroOptimizer_Stage3": ("overflow", "loss_scaler", "cur_scale", "fp32_partitioned_groups_flat"),
    "BF16_Optimizer": ("overflow", *LINKING),
}
PARTITIONED = ("ds_id", "ds_shape", "ds_tensor")
DIVIDING = (
    *("_convert_to_zero_parameters", "_convert_to_deepspeed_param", "_zero_init_param", "_aligned_size"),
    *("_partition_world_size", "_partition_rank"),
)


def check(engine: deepspeed.DeepSpeedEngine) -> None:
    """Check that the installed DeepSpeed has everything that this module uses.

    Raises:
        UserError: something is missing.
    """
    optimizer, scaler = getattr(engine, "optimizer", None), _loss_scaler(engine)
    parameters = [each for each in engine.module.parameters() if is_partitioned(each)]
    used = [
        ("zero.Init", deepspeed.zero.Init, DIVIDING),
        ("the engine", engine, ENGINE),
        (type(optimizer).__name__, optimizer, OPTIMIZERS.get(type(optimizer).__name__, ())),
        ("the loss scale", scaler, (*LOSS_SCALE, LIMIT) if isinstance(scaler, DynamicLossScaler) else ()),
        *(("a parameter", each, PARTITIONED) for each in parameters[:1]),
    ]
    missing = [f"{name} of {what}" for what, owner, names in used for name in names if not hasattr(owner, name)]
    if not hasattr(deepspeed.ops, "__compatible_ops__"):
        missing.append("__compatible_ops__ of deepspeed.ops")
    if missing:
        raise UserError(
            f"deepspeed: the installed DeepSpeed {version('deepspeed')} lacks {', '.join(missing)}; "
            f"install deepspeed=={CHECKED}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The engine
# ---------------------------------------------------------------------------------------------------------------------


def sum_by_gloo() -> None:
    """Let processes without a GPU sum with gloo.

    DeepSpeed would use a C++ extension that takes a minute to compile.
    """
    deepspeed.ops.__compatible_ops__[SUMS] = False


def sum_no_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let an engine without ZeRO on one process leave gradients in place.

    It would copy all gradients to and from a buffer, for a sum over one process.
    """
    engine.allreduce_gradients = lambda *_, **__: None


def leave_out_steps(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let ZeRO skip steps with non-finite gradients in every dtype, without raising errors."""
    engine.optimizer.check_grad_overflow = True
    if scaler := _loss_scaler(engine):
        scaler.raise_error_at_min_scale = False


def tell_norm(engine: deepspeed.DeepSpeedEngine, norm: Tensor, skip: bool) -> None:
    """Give an engine without ZeRO the gradient norm, and whether the step is skipped."""
    engine._global_grad_norm = norm
    engine.optimizer.overflow = skip


def step_was_skipped(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Return whether the last optimizer step was skipped because of non-finite gradients."""
    return bool(getattr(engine.optimizer, "overflow", False))


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer's state
# ---------------------------------------------------------------------------------------------------------------------


def inner_optimizer(engine: deepspeed.DeepSpeedEngine) -> Optimizer:
    """Return the optimizer that computes the updates, which ZeRO's optimizer wraps."""
    return engine.basic_optimizer


def uses_zero(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Return whether the optimizer's state is divided among processes, in flat tensors."""
    return engine.zero_optimization()


def pieces(engine: deepspeed.DeepSpeedEngine, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the tensors for which the inner optimizer keeps states on this process.

    Without ZeRO, these are the parameters; with ZeRO, flat float32 tensors.
    """
    if not uses_zero(engine):
        return list(parameters)
    if engine.zero_optimization_partition_weights():
        return engine.optimizer.fp32_partitioned_groups_flat
    return [piece for group in inner_optimizer(engine).param_groups for piece in group["params"]]


def link_states(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let parameters find their parts of the flat tensors of ZeRO-1 and ZeRO-2.

    DeepSpeed does this at the first step. With several parameter groups, however, it then links only those of the first
    group.
    """
    zero = engine.optimizer
    if hasattr(zero, "_hp_optimizer_states_linked") and inner_optimizer(engine).state:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def current_scale(engine: deepspeed.DeepSpeedEngine) -> float:
    """Return the factor by which the loss is currently multiplied, in float16."""
    return float(engine.optimizer.cur_scale)


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> dict[str, int | float]:
    """Return the state of a dynamic loss scale; empty for a fixed one."""
    scaler = _loss_scaler(engine)
    if not isinstance(scaler, DynamicLossScaler):
        return {}
    return {name: getattr(scaler, name) for name in LOSS_SCALE}


def set_loss_scale(engine: deepspeed.DeepSpeedEngine, numbers: Mapping[str, int | float]) -> None:
    """Restore a dynamic loss scale from the result of `loss_scale`.

    Nothing happens if one of the two is fixed.
    """
    if loss_scale(engine) and numbers:
        for name, number in numbers.items():
            setattr(_loss_scaler(engine), name, number)


def _loss_scaler(engine: deepspeed.DeepSpeedEngine) -> Any:
    return getattr(getattr(engine, "optimizer", None), "loss_scaler", None)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters that ZeRO-3 has divided
# ---------------------------------------------------------------------------------------------------------------------


class DividedFromFiles(deepspeed.zero.Init):
    """Divides the parameters of `module` in the same way as DeepSpeed.

    Each process reads only its own part of parameters that wait for their values (`weights.stored_values`). DeepSpeed
    itself first puts the whole parameter on each process's device, and sends it there from the first process.
    """

    def _convert_to_zero_parameters(self, param_list: Iterable[nn.Parameter]) -> None:
        parameters = [each for each in param_list if not is_partitioned(each)]
        # Each holds one whole parameter at a time; pages that are not touched take no memory.
        rooms: dict[torch.dtype, Tensor] = {}
        for parameter in parameters:
            value = value_of(parameter)
            if value is None:
                continue
            if parameter.dtype not in rooms:
                alike = [each for each in parameters if value_of(each) is not None and each.dtype == parameter.dtype]
                rooms[parameter.dtype] = torch.empty(max(map(Tensor.numel, alike)), dtype=parameter.dtype)
            whole = rooms[parameter.dtype][: parameter.numel()].view(parameter.shape)
            self._convert_to_deepspeed_param(parameter)
            if self.zero_param_process_group is not None:  # a second part is kept, for a smaller group of processes
                value.fill(whole, 0, whole.numel())
            else:
                length = self._aligned_size(parameter) // self._partition_world_size(parameter)
                start = length * self._partition_rank(parameter)
                value.fill(whole, start, min(start + length, whole.numel()))
            parameter.data = whole
            forget_value(parameter)
            parameter.partition()
            parameter.data = torch.empty(0, dtype=whole.dtype, device=self.local_device)
        super()._convert_to_zero_parameters(parameters)


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether ZeRO-3 has replaced a parameter by an empty tensor."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the full shape of a parameter, even if it is partitioned."""
    return getattr(parameter, "ds_shape", parameter.shape)


def part_of(parameter: Tensor, value: Tensor, rank: int) -> Tensor:
    """Return the part of `value` that the data-parallel process `rank` holds.

    The parts of a partitioned parameter are flat and equally long; the last one is padded with zeros. The result has
    the dtype of `value`, and is on the device of `parameter`.
    """
    length = parameter.ds_tensor.ds_numel
    part = value.flatten()[rank * length : (rank + 1) * length]
    return torch.nn.functional.pad(part, (0, length - part.numel())).to(parameter.device)
