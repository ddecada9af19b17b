"""Read and write optimizer states, independently of how DeepSpeed distributes them.

ZeRO keeps float32 copies of the trained weights and the optimizer's tensors (moments, moving average) in flat pieces,
one on each data-parallel process. Here they are assembled for each parameter, and divided again, so that a checkpoint
fits any number of processes and any ZeRO stage. All functions are collective over the data-parallel group.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from sat import mpu
from torch import Tensor, nn

from cogvideox_sat.training.deepspeed_adapter import (
    full_shape,
    inner_optimizer,
    is_partitioned,
    link_states,
    loss_scale,
    part_of,
    pieces,
    set_loss_scale,
    uses_zero,
)
from sgm.errors import UserError

MASTER = "master"  # kind of the float32 copy of a weight, besides the optimizer's own kinds of tensors


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def tensor_kinds(engine: deepspeed.DeepSpeedEngine) -> list[str]:
    """Return the kinds of tensors kept for parameters; before the first step only `MASTER`."""
    kinds = {
        kind
        for piece, state in inner_optimizer(engine).state.items()
        for kind, value in state.items()
        if isinstance(value, Tensor) and value.shape == piece.shape and value.ndim > 0
    }
    return sorted(kinds) + ([MASTER] if uses_zero(engine) else [])


def check_storable(engine: deepspeed.DeepSpeedEngine) -> None:
    """Check, after the first step, that the optimizer's state can be saved.

    It may keep only numbers, and tensors with the parameter's shape, for a parameter; with ZeRO, the same kinds for
    each.

    Raises:
        UserError: the optimizer keeps something else.
    """
    optimizer = inner_optimizer(engine)
    kinds = set(tensor_kinds(engine)) - {MASTER}
    for piece, state in optimizer.state.items():
        tensors = {kind for kind, value in state.items() if isinstance(value, Tensor) and value.ndim > 0}
        unlike = uses_zero(engine) and tensors != kinds
        if unlike or any(state[kind].shape != piece.shape for kind in tensors):
            raise UserError(
                f"the state of {type(optimizer).__name__} cannot be saved, since its tensors do not have the shapes of "
                "the weights; choose another optimizer, for example sat.ops.FusedEmaAdam or torch.optim.AdamW"
            )


def full_tensors(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (kind, parameter name, float32 tensor of the parameter's shape), one at a time.

    The tensor is on the parameter's device. It may be the optimizer's own: do not change it, and copy it before the
    next step.
    """
    kinds = tensor_kinds(engine)
    link_states(engine)
    for name, parameter in trained_parameters(engine.module).items():
        for kind in kinds:
            if _lacks(engine, parameter, kind):
                continue
            if kind == MASTER:
                tensor = safe_get_full_fp32_param(parameter)
            elif uses_zero(engine):
                tensor = safe_get_full_optimizer_state(parameter, kind)
            else:
                tensor = inner_optimizer(engine).state[parameter][kind]
            yield kind, name, tensor.detach().view(full_shape(parameter))


def _lacks(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter, kind: str) -> bool:
    """Return whether the optimizer has no tensor of this kind for this parameter."""
    return not uses_zero(engine) and kind not in inner_optimizer(engine).state[parameter]


def counters(engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
    """Return the optimizer's plain numbers, such as its step; JSON-able.

    They are the same for all parameters.
    """
    optimizer = inner_optimizer(engine)
    state: Mapping[str, Any] = next(iter(optimizer.state.values()), {})
    numbers = {kind: _number(value) for kind, value in state.items() if _is_number(value)}
    rates = [group["lr"] for group in optimizer.param_groups]
    added = optimizer.param_groups[0].keys() - optimizer.defaults.keys() - {"params", "initial_lr"}
    group = {key: optimizer.param_groups[0][key] for key in added if _is_number(optimizer.param_groups[0][key])}
    kinds, parameters = tensor_kinds(engine), trained_parameters(engine.module).items()
    return {
        "kinds": kinds,
        "lacking": {kind: [name for name, each in parameters if _lacks(engine, each, kind)] for kind in kinds},
        "model_parallel_size": mpu.get_model_parallel_world_size(),
        "state": numbers,
        "group": group,
        "rates": rates,
        "loss_scaler": loss_scale(engine),
    }


def restore(
    engine: deepspeed.DeepSpeedEngine, tensors: Mapping[tuple[str, str], Tensor], numbers: dict[str, Any]
) -> None:
    """Restore an optimizer that has made no step from `full_tensors` and `counters`.

    Raises:
        UserError: a tensor is missing or does not fit, or tensors or groups exist that the numbers do not mention.
    """
    kinds, lacking = numbers["kinds"], numbers.get("lacking", {})
    groups = inner_optimizer(engine).param_groups
    if unknown := {kind for kind, _ in tensors} - set(kinds):
        raise UserError(
            f"resume: the training state is damaged: it does not list {min(unknown)}, which its files hold; name "
            "another checkpoint"
        )
    if len(numbers["rates"]) != len(groups):
        raise UserError(
            f"resume: the training state has the learning rates of {len(numbers['rates'])} groups of parameters, but "
            f"the optimizer has {len(groups)}; train with the optimizer and the model with which the run began"
        )
    _create_states(engine, [kind for kind in kinds if kind != MASTER], numbers)
    for name, parameter in trained_parameters(engine.module).items():
        for kind in kinds:
            if name in lacking.get(kind, ()) and not uses_zero(engine):
                del inner_optimizer(engine).state[parameter][kind]
                continue
            if (kind, name) not in tensors:
                raise UserError(f"resume: the training state has no {kind} of {name}; name another checkpoint")
            value = tensors[kind, name]
            if value.shape != full_shape(parameter) or not value.is_floating_point():
                raise UserError(
                    f"resume: the training state has a {kind} of {name} of {str(value.dtype).removeprefix('torch.')} "
                    f"{tuple(value.shape)}, which does not fit its shape {tuple(full_shape(parameter))}; name another "
                    "checkpoint"
                )
            if not value.isfinite().all():
                raise UserError(
                    f"resume: the training state has a {kind} of {name} that is not finite; name another checkpoint"
                )
            _set(engine, parameter, kind, value)
    for group, rate in zip(groups, numbers["rates"], strict=True):
        group.update(numbers["group"], lr=rate)
    set_loss_scale(engine, numbers["loss_scaler"])


def _set(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    if not uses_zero(engine):
        target = parameter.data if kind == MASTER else inner_optimizer(engine).state[parameter][kind]
        target.copy_(value)
    elif is_partitioned(parameter):
        local = part_of(parameter, value, mpu.get_data_parallel_rank())
        if kind == MASTER:
            safe_set_local_fp32_param(parameter, local)
        else:
            safe_set_local_optimizer_state(parameter, local, kind)
    elif kind == MASTER:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


def _create_states(engine: deepspeed.DeepSpeedEngine, kinds: list[str], numbers: dict[str, Any]) -> None:
    """Create the entries that the optimizer itself would create at its first step."""
    optimizer = inner_optimizer(engine)
    on_device = any(optimizer.defaults.get(option) for option in ("fused", "capturable"))
    for piece in pieces(engine, trained_parameters(engine.module).values()):
        device = piece.device if on_device else "cpu"
        state = {kind: torch.zeros_like(piece) for kind in kinds}
        for kind, number in numbers["state"].items():
            is_tensor = isinstance(number, float)
            state[kind] = torch.tensor(number, dtype=torch.float32, device=device) if is_tensor else number
        optimizer.state[piece] = state
    link_states(engine)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)


def _number(value: Any) -> int | float:
    """Return a number; PyTorch's own optimizers count in float32 tensors, which become floats."""
    return float(value) if isinstance(value, Tensor) else value
