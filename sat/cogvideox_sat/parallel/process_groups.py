"""Process groups that SwissArmyTransformer's layers expect, with or without a launcher."""

import torch.distributed as dist
from sat import mpu

from cogvideox_sat.configuration.video_layout import check_divides
from cogvideox_sat.parallel.agreement import join_processes, leave_processes
from sgm.errors import UserError


def initialize_process_groups(model_parallel_size: int = 1, limit: float | None = None) -> None:
    """Set up torch.distributed and SwissArmyTransformer's `mpu` groups.

    A second call does nothing. `parallel.agreement.join_processes` takes the `limit` of collectives.

    Raises:
        UserError: the number of processes is not a multiple of `model_parallel_size`, or the groups already exist with
            another size.
    """
    if not dist.is_initialized():
        mpu.destroy_model_parallel()  # its groups belong to a torch.distributed that has been shut down since
    join_processes(limit)
    if mpu.model_parallel_is_initialized():
        current = mpu.get_model_parallel_world_size()
        if current != model_parallel_size:
            raise UserError(
                f"model_parallel_size is {model_parallel_size}, but this process already runs with {current}"
            )
        return
    check_divides("model_parallel_size", model_parallel_size, dist.get_world_size())
    mpu.initialize_model_parallel(model_parallel_size)


def parallel_groups() -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Return this process's model-parallel and data-parallel group; None for a group of one."""

    def unless_alone(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
        return group if dist.get_world_size(group) > 1 else None

    return unless_alone(mpu.get_model_parallel_group()), unless_alone(mpu.get_data_parallel_group())


def destroy_process_groups() -> None:
    """Undo `initialize_process_groups`; do nothing if there are no groups."""
    mpu.destroy_model_parallel()
    leave_processes()
