"""Process groups that SwissArmyTransformer's layers expect, with or without a launcher."""

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from sat import mpu

from sgm.context_parallel import destroy_context_parallel
from sgm.errors import UserError

LONGEST_WAIT = timedelta(days=7)


def initialize_process_groups(model_parallel_size: int = 1) -> None:
    """Make sure that torch.distributed and SwissArmyTransformer's `mpu` groups exist; a second call does nothing.

    Under torchrun the launcher's variables are used (NCCL on CUDA, gloo on a CPU). In a plain process the group
    consists of that process alone and opens no port.

    Raises:
        UserError: the number of processes is no multiple of `model_parallel_size`, or the groups exist already
            with another size.
    """
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Processes wait for the slowest at the end of a run, however long its prompts take.
            dist.init_process_group(backend, timeout=LONGEST_WAIT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(destroy_process_groups)  # gloo may abort a process that ends with its groups alive
    if mpu.model_parallel_is_initialized():
        current = mpu.get_model_parallel_world_size()
        if current != model_parallel_size:
            raise UserError(
                f"model_parallel_size is {model_parallel_size}, but this process already runs with {current}"
            )
        return
    world_size = dist.get_world_size()
    if world_size % model_parallel_size:
        raise UserError(f"model_parallel_size {model_parallel_size} does not divide the {world_size} processes")
    mpu.initialize_model_parallel(model_parallel_size)


def parallel_groups() -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The model-parallel and the data-parallel group of this process; None for a group of one."""
    groups = mpu.get_model_parallel_group(), mpu.get_data_parallel_group()
    return tuple(group if dist.get_world_size(group) > 1 else None for group in groups)


def destroy_process_groups() -> None:
    """The opposite of `initialize_process_groups`; nothing where there are no groups."""
    mpu.destroy_model_parallel()
    destroy_context_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
