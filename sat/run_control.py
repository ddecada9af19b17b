"""What every training run needs whatever it trains: processes that agree, and signals that end it in good order."""

import atexit
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from rendezvous import meet
from sgm.context_parallel import destroy_context_parallel
from sgm.errors import UserError

logger = logging.getLogger("train_video")

LONGEST_WAIT = timedelta(days=7)


# ---------------------------------------------------------------- processes


def join_processes() -> None:
    """Make sure that torch.distributed is set up; a second call does nothing.

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
        store, rank, size = meet()
        store.set_timeout(LONGEST_WAIT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LONGEST_WAIT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(leave_processes)  # gloo may abort a process that ends with its groups alive


def leave_processes() -> None:
    """The opposite of `join_processes`; nothing where there is no group."""
    destroy_context_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def any_process(flag: bool) -> bool:
    """Whether `flag` is set on any process. On the CPU: no device is waited for."""
    if dist.get_world_size() == 1:
        return flag
    total = torch.tensor(int(flag))
    dist.all_reduce(total)
    return bool(total)


def from_first_process(make: Callable[[], Any]) -> Any:
    """What `make` returns on the first process, on all of them.

    Raises:
        UserError: it failed there.
    """
    result = [None, ""]
    if dist.get_rank() == 0:
        try:
            result[0] = make()
        except UserError as error:
            result[1] = str(error)
    dist.broadcast_object_list(result)
    if result[1]:
        raise UserError(result[1])
    return result[0]


# ---------------------------------------------------------------- begin and end


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Leaves no empty folder behind when the block fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it is not empty, or another process was faster
            folder.rmdir()
        raise


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """The signals SIGTERM and SIGINT that came, instead of their usual effect, which a second SIGINT has again."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if not received:
            logger.info("%s: finishing the step, then saving", signal.Signals(number).name)
        received.append(number)
        if number == signal.SIGINT:  # launchers may send SIGTERM twice
            signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- data


def describe_data(dataset: Dataset, samples: int) -> str:
    """What there is to train on, and how often a run that takes so many `samples` goes through it."""
    buckets = Counter(dataset.bucket(index) for index in range(len(dataset)))
    shapes = [f"{count} of {bucket}" for bucket, count in buckets.most_common(5)]
    more = [f"{len(buckets) - 5} more shapes"] if len(buckets) > 5 else []
    passes = samples / len(dataset)
    return f"{len(dataset)} clips, {passes:.1f} passes over them: {', '.join([*shapes, *more])}"
