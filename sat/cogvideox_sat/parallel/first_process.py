"""Share the result of one process with all processes of a group."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from sgm.errors import UserError

Result = TypeVar("Result")


def made_by_first(
    make: Callable[[], Result], leads: bool, group: dist.ProcessGroup | None, before: Callable[[], object] | None = None
) -> Result:
    """Return on all processes of a group what `make` returns on the first one.

    Args:
        leads: whether this process is the first.
        group: the group; None: all processes.
        before: called on all processes after `make` and before the result is exchanged.

    Raises:
        UserError: `make` raised it on the first process.
    """
    outcome: list[Any] = [None, None]
    if leads:
        try:
            outcome = [make(), None]
        except UserError as error:
            outcome = [None, error]
    if before is not None:
        before()
    if dist.get_world_size(group) > 1:
        dist.broadcast_object_list(outcome, group=group, group_src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result
