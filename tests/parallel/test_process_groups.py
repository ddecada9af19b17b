"""The groups of processes are there again after they were left, however they were left."""

import torch.distributed as dist
from sat import mpu

from cogvideox_sat.parallel.agreement import leave_processes
from cogvideox_sat.parallel.process_groups import destroy_process_groups, initialize_process_groups


def test_groups_of_a_torch_distributed_that_was_left_are_made_anew():
    initialize_process_groups()
    leave_processes()  # as in VAE training, which does not use SwissArmyTransformer's groups
    assert not dist.is_initialized()
    try:
        initialize_process_groups()
        assert mpu.get_model_parallel_rank() == 0
    finally:
        destroy_process_groups()
