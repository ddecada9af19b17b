"""All undocumented parts of PyTorch that runs of several processes use.

No other module of this project uses these functions of `torch.distributed`.
"""

import torch.distributed as dist
from torch.distributed import distributed_c10d

CHECKED = "2.14.1"  # the version of PyTorch with which this module was tested


def all_groups() -> list[dist.ProcessGroup]:
    """Return every process group that this process or its libraries made or belong to."""
    return list(distributed_c10d._world.pg_map)


def group_named(name: str) -> dist.ProcessGroup:
    """Return the process group with the given `group_name`."""
    return distributed_c10d._resolve_process_group(name)


def abort_groups() -> None:
    """Drop the connections of all groups at once, without waiting for the other processes."""
    distributed_c10d._abort_process_group()


def own_store() -> dist.Store:
    """Return a connection to the default group's store on which no other thread waits.

    Raises:
        RuntimeError, NotImplementedError: this kind of store allows no second connection.
    """
    return distributed_c10d._get_default_store().clone()
