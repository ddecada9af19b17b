"""End all processes of a run when one of them fails."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from cogvideox_sat.parallel.torch_internals import abort_groups
from sgm.errors import UserError

# What gloo and NCCL say in the processes that are left.
LOST_PEER = re.compile(
    r"Connection (closed|reset) by|Connection was likely closed|Broken pipe|remote process exited|ncclRemoteError"
)


@contextmanager
def failing_together() -> Iterator[None]:
    """Let no process of a run hang when the block fails in one of them.

    The one that fails drops its connections without a word to the others, which may be inside a step that it no longer
    takes part in. Those then see it gone, and say so instead of showing where they were.

    Raises:
        UserError: another process has failed.
    """
    try:
        yield
    except BaseException as error:
        shared = dist.is_initialized() and dist.get_world_size() > 1
        if shared and dist.get_backend() != "gloo":  # NCCL would wait for the others to join in the end
            with suppress(Exception):
                abort_groups()
        if shared and isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
            raise UserError("another process has failed, and says why") from error
        raise
