"""Let the processes of a run connect, wait for each other, and agree."""

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

LONGEST_WAIT = timedelta(days=7)  # for work without a time limit; see `parallel.process_watch`
NO_ANSWER = re.compile(r"time[d ]* ?out", re.IGNORECASE)  # in errors of gloo and the store about a silent process

_patient: dist.ProcessGroup | None = None  # group of all processes, for `meet`


def join_processes(limit: float | None = None) -> None:
    """Set up torch.distributed; a second call does nothing.

    Under torchrun, the launcher's variables are used (NCCL on CUDA, gloo on a CPU). In a plain process, the group
    consists of that process alone and opens no port.

    Args:
        limit: seconds for a collective, for runs whose processes call `meet` after all long work; None: as long as the
            longest work takes.

    Raises:
        UserError: not all processes connected.
    """
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # At the end of a run, processes wait for the slowest one, however long its work takes.
        store, rank, size = rendezvous.connect()
        store.set_timeout(LONGEST_WAIT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_backend_limit(limit))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(leave_processes)  # gloo may abort a process that ends while its groups still exist


def leave_processes() -> None:
    """Undo `join_processes`; do nothing if there is no group."""
    global _patient
    _patient = None
    destroy_context_parallel()
    forget_video_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


def prepare_meetings() -> None:
    """Make the group for `meet`; all processes call this after `join_processes`."""
    global _patient
    if _patient is None and dist.get_world_size() > 1:
        _patient = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)


def meet(what: str, count: int = 0) -> int:
    """Wait until all processes have called this; return the sum of `count` over them.

    Args:
        what: what is waited for; ends the sentence "rank 0 waits for ...".
    """
    if dist.get_world_size() == 1:
        return count
    total = torch.tensor(count)
    with process_watch.phase(what, waiting=True):
        dist.all_reduce(total, group=_patient)
    return int(total)


def limit_collectives(limit: float) -> None:
    """Set the limit of `join_processes` for all existing groups, except the one for `meet`.

    Libraries make groups with limits of their own, which for NCCL are 10 minutes.
    """
    for group in all_groups():
        if group is not _patient and group is not dist.GroupMember.NON_GROUP_MEMBER:
            with suppress(Exception):  # some backends have no limit
                dist.set_timeout(_backend_limit(limit), group)


def _backend_limit(limit: float | None) -> timedelta:
    if limit is None:
        return LONGEST_WAIT
    # NCCL ends the process without a clear message; the watch ends it first.
    return timedelta(seconds=limit) + (process_watch.GRACE if torch.cuda.is_available() else timedelta())


@contextmanager
def limited_collectives(limit: float) -> Iterator[None]:
    """Watch the processes within the block, and end this one if another does not answer.

    If another process does not answer within the limit, one line is logged and this process ends at once, with exit
    code 2. An orderly end would wait for the other process again.

    Args:
        limit: seconds for a collective, as given to `join_processes`.
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
    """Return whether `flag` is set on any process, without waiting for a GPU."""
    return flags_of_any_process(flag)[0]


def flags_of_any_process(*flags: bool) -> list[bool]:
    """Return for each flag whether it is set on any process, without waiting for a GPU."""
    if dist.get_world_size() == 1:
        return list(flags)
    totals = torch.tensor(flags, dtype=torch.int64)
    dist.all_reduce(totals)
    return [bool(total) for total in totals]


def patient_group(member: bool) -> dist.ProcessGroup | None:
    """Make a group of the processes that pass `member=True`; all processes call this.

    The group is meant for a thread of these processes and has no short time limit.

    Returns:
        None for a process that is not a member, or that is the only member.
    """
    members: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(members, member)
    ranks = [rank for rank, is_member in enumerate(members) if is_member]
    if len(ranks) < 2:
        return None
    group = dist.new_group(ranks, backend="gloo", timeout=LONGEST_WAIT)
    return group if member else None


def from_first_process(make: Callable[[], Any], what: str = "the first process") -> Any:
    """Return on all processes what `make` returns on the first one.

    Args:
        what: what the other processes wait for, for messages.

    Raises:
        UserError: `make` raised it on the first process.
    """
    return made_by_first(make, dist.get_rank() == 0, None, before=lambda: meet(what))


def least_over_processes(value: int) -> int:
    """Return the minimum of a number over all processes, without waiting for a GPU."""
    if dist.get_world_size() == 1:
        return value
    least = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def total_over_processes(count: int) -> int:
    """Return the sum of a number over all processes.

    This waits for all of them, because a launcher ends all processes when one exits with an error.
    """
    total = torch.tensor(count)
    dist.all_reduce(total)
    return int(total)
