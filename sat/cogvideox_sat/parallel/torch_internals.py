"""All that runs of several processes take from PyTorch without its documentation promising it.

No other module of this project names these functions of `torch.distributed`.
"""

import torch.distributed as dist
from torch.distributed import distributed_c10d

CHECKED = "2.14.1"  # the version that all of this was tried with


def all_groups() -> list[dist.ProcessGroup]:
    """Return every group of processes that this process has made or belongs to, those of libraries too."""
    return list(distributed_c10d._world.pg_map)


def group_named(name: str) -> dist.ProcessGroup:
    """Return the group of processes with that `group_name`."""
    return distributed_c10d._resolve_process_group(name)


def abort_groups() -> None:
    """Drop the connections of all groups at once, without waiting for the other processes."""
    distributed_c10d._abort_process_group()


def own_store() -> dist.Store:
    """Return a connection to the store of the default group that no other thread waits on.

    Raises:
        RuntimeError, NotImplementedError: the store is of a kind that cannot be connected to twice.
    """
    return distributed_c10d._get_default_store().clone()
