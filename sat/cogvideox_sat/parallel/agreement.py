"""Let the processes of a run find each other, meet, and agree."""

import atexit
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cogvideox_sat.parallel import process_watch, rendezvous
from cogvideox_sat.parallel.first_process import made_by_first
from cogvideox_sat.parallel.torch_internals import all_groups
from cogvideox_sat.parallel.video_groups import forget_video_groups
from sgm.context_parallel import destroy_context_parallel

logger = logging.getLogger(__name__)

LONGEST_WAIT = timedelta(days=7)  # for work that takes as long as it takes; see `parallel.process_watch`
NO_ANSWER = re.compile(r"time[d ]* ?out", re.IGNORECASE)  # what gloo and the store say of a process that is silent

_patient: dist.ProcessGroup | None = None  # of all processes, for meetings


def join_processes(limit: float | None = None) -> None:
    """Make sure that torch.distributed is set up; a second call does nothing.

    Args:
        limit: seconds for a collective, for runs whose processes `meet` after all that takes long; None: as long as
            the longest work takes.

    Under torchrun the launcher's variables are used (NCCL on CUDA, gloo on a CPU). In a plain process the group
    consists of that process alone and opens no port.

    Raises:
        UserError: not all processes came to the meeting.
    """
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Processes wait for the slowest at the end of a run, however long its work takes.
        store, rank, size = rendezvous.meet()
        store.set_timeout(LONGEST_WAIT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_backend_limit(limit))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(leave_processes)  # gloo may abort a process that ends with its groups alive


def leave_processes() -> None:
    """The opposite of `join_processes`; nothing where there is no group."""
    global _patient
    _patient = None
    destroy_context_parallel()
    forget_video_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


def prepare_meetings() -> None:
    """Make the group in which processes `meet`; all processes call it, after `join_processes`."""
    global _patient
    if _patient is None and dist.get_world_size() > 1:
        _patient = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)


def meet(what: str, count: int = 0) -> int:
    """Return the sum of `count` over all processes, once all of them have come here.

    Args:
        what: that is waited for, to end the sentence "rank 0 waits for ...".
    """
    if dist.get_world_size() == 1:
        return count
    total = torch.tensor(count)
    with process_watch.phase(what, waiting=True):
        dist.all_reduce(total, group=_patient)
    return int(total)


def limit_collectives(limit: float) -> None:
    """Give all groups that exist, but the one for meetings, the limit of `join_processes`: libraries make groups with
    limits of their own, which for NCCL are 10 minutes."""
    for group in all_groups():
        if group is not _patient and group is not dist.GroupMember.NON_GROUP_MEMBER:
            with suppress(Exception):  # a backend that has none
                dist.set_timeout(_backend_limit(limit), group)


def _backend_limit(limit: float | None) -> timedelta:
    if limit is None:
        return LONGEST_WAIT
    # NCCL ends the process without a clear line; the watch does it first.
    return timedelta(seconds=limit) + (process_watch.GRACE if torch.cuda.is_available() else timedelta())


@contextmanager
def limited_collectives(limit: float) -> Iterator[None]:
    """Watch the processes within the block. If another one does not answer within the limit, tell so in one line and
    end this process at once, with exit code 2: leaving in good order would wait for the other one again.

    Args:
        limit: seconds for a collective, as `join_processes` got it.
    """
    prepare_meetings()
    with process_watch.watching(limit, ends_slow_steps=torch.cuda.is_available()):
        try:
            yield
        except RuntimeError as error:
            if dist.get_world_size() > 1 and NO_ANSWER.search(str(error)) and "CUDA" not in str(error):
                process_watch.end_process(
                    f"collective_timeout: rank {dist.get_rank()} waited {limit:g} s for another process, at "
                    f"{process_watch.current_text()}; {process_watch.REMEDY}"
                )
            raise


def any_process(flag: bool) -> bool:
    """Whether `flag` is set on any process. On the CPU: no device is waited for."""
    return flags_of_any_process(flag)[0]


def flags_of_any_process(*flags: bool) -> list[bool]:
    """Return of each flag whether it is set on any process. On the CPU: no device is waited for."""
    if dist.get_world_size() == 1:
        return list(flags)
    totals = torch.tensor(flags, dtype=torch.int64)
    dist.all_reduce(totals)
    return [bool(total) for total in totals]


def patient_group(member: bool) -> dist.ProcessGroup | None:
    """Make a group of the processes that say `member`, for a thread of theirs to meet in; all processes call it.

    Returns:
        None for a process that is no member, or that is the only one.
    """
    members: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(members, member)
    ranks = [rank for rank, is_member in enumerate(members) if is_member]
    if len(ranks) < 2:
        return None
    group = dist.new_group(ranks, backend="gloo", timeout=LONGEST_WAIT)
    return group if member else None


def from_first_process(make: Callable[[], Any], what: str = "the first process") -> Any:
    """What `make` returns on the first process, on all of them.

    Args:
        what: the others wait for.

    Raises:
        UserError: it failed there.
    """
    return made_by_first(make, dist.get_rank() == 0, None, before=lambda: meet(what))


def least_over_processes(value: int) -> int:
    """Return the least of a number over all processes. On the CPU: no device is waited for."""
    if dist.get_world_size() == 1:
        return value
    least = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def total_over_processes(count: int) -> int:
    """Return the sum over all processes. Waits for them, since a launcher ends all processes when one exits with an
    error."""
    total = torch.tensor(count)
    dist.all_reduce(total)
    return int(total)
