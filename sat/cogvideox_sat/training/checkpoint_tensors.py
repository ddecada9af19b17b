"""Assemble and copy the tensors of a checkpoint, and estimate their size."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import deepspeed
from sat import mpu
from torch import Tensor, nn

from cogvideox_sat.training import optimizer_state
from cogvideox_sat.training.deepspeed_adapter import full_shape, is_partitioned

FLOAT32_BYTES = 4
SHADOW = "shadow"  # the optimizer's name for the moving average of a weight
Weights = Iterable[tuple[str, Tensor]]
OptimizerTensors = Iterable[tuple[str, str, Tensor]]  # kind, parameter, tensor


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor in host memory."""
    return tensor.to("cpu", copy=True)


def gathered_weights(
    network: nn.Module, full: bool, keep: bool = True, copy: Callable[[Tensor], Tensor] = on_host
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and copies of the trained parameters.

    With `full`, the whole state dict is yielded. This is collective: all processes take all items. Tensors are whole
    and have the network's dtypes.

    Args:
        keep: False: yield nothing, only help to assemble what ZeRO-3 has partitioned.
        copy: returns a copy of a tensor, in memory that the next steps do not change.
    """
    for name, tensor in network.state_dict(keep_vars=True).items():
        if not (full or tensor.requires_grad):
            continue
        with deepspeed.zero.GatheredParameters([tensor]) if is_partitioned(tensor) else nullcontext():
            if keep:
                yield name, copy(tensor.detach())


def copied(
    tensors: OptimizerTensors, keep: bool, copy: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, str, Tensor]]:
    """Yield copies of the optimizer's tensors, whole and in float32.

    The arguments are those of `gathered_weights`.
    """
    for kind, name, tensor in tensors:
        if keep:
            yield kind, name, copy(tensor)


def estimated_bytes(engine: deepspeed.DeepSpeedEngine, full: bool) -> int:
    """Return the size of a checkpoint in bytes, for all model-parallel shares together."""
    network = engine.module
    kinds = optimizer_state.tensor_kinds(engine)
    entries = [tensor for tensor in network.state_dict(keep_vars=True).values() if full or tensor.requires_grad]
    weights = sum(full_shape(tensor).numel() * tensor.element_size() for tensor in entries)
    trained = optimizer_state.trained_parameters(network).values()
    state = sum(FLOAT32_BYTES * full_shape(parameter).numel() for parameter in trained) * len(kinds)
    return (weights * (2 if SHADOW in kinds else 1) + state) * mpu.get_model_parallel_world_size()
