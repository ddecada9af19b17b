"""End all processes of a run when one of them fails."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from cogvideox_sat.parallel.torch_internals import abort_groups
from sgm.errors import UserError

# Errors of gloo and NCCL in the remaining processes.
LOST_PEER = re.compile(
    r"Connection (closed|reset) by|Connection was likely closed|Broken pipe|remote process exited|ncclRemoteError"
)


@contextmanager
def failing_together() -> Iterator[None]:
    """Keep the processes of a run from hanging when the block fails in one of them.

    The failing process drops its connections without a message to the others, which may be waiting for it within a
    step. The others then notice that it is gone, and report this instead of a traceback.

    Raises:
        UserError: another process has failed.
    """
    try:
        yield
    except BaseException as error:
        shared = dist.is_initialized() and dist.get_world_size() > 1
        if shared and dist.get_backend() != "gloo":  # NCCL would wait for the other processes
            with suppress(Exception):
                abort_groups()
        if shared and isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
            raise UserError("another process has failed; see its message") from error
        raise
