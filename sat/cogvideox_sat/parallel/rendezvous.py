"""Connect to the other processes of a run, with a limit on how long any process waits."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import Store
from torch.distributed.rendezvous import rendezvous

from sgm.errors import UserError

LIMIT = timedelta(seconds=120)  # for connecting


def connect() -> tuple[Store, int, int]:
    """Return the shared store, this process's rank, and the number of processes.

    They follow from the launcher's environment variables.

    Raises:
        UserError: a variable is missing, the port is taken, or not all processes came within `LIMIT`.
    """
    size = os.environ["WORLD_SIZE"]
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"{name} is not set, but WORLD_SIZE is {size}; start with torchrun, or unset WORLD_SIZE")
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        with silent_standard_error():  # PyTorch prints the stack of every attempt
            own_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            if own_store and os.environ["RANK"] != "0":
                _wait_for_first(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            store, rank, number = next(rendezvous("env://", timeout=LIMIT))
            if own_store:  # otherwise torchrun itself notices missing processes
                _wait_for_all(store, number)
        return store, rank, number
    except (RuntimeError, ValueError, OSError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise UserError(f"MASTER_PORT: {place} is in use by another program; set another port") from error
        if isinstance(error, ValueError):
            raise UserError(
                f"the launcher's variables (RANK, WORLD_SIZE, MASTER_PORT): {error}; start with torchrun"
            ) from error
        raise UserError(
            f"WORLD_SIZE is {size}, but fewer processes connected to {place} within {LIMIT.total_seconds():.0f} s; "
            "start all of them, or unset RANK and WORLD_SIZE to run alone"
        ) from error


def _wait_for_first(address: str, port: int) -> None:
    """Wait until a process listens at the address; raise OSError after `LIMIT`.

    PyTorch's own attempts would exceed this limit.
    """
    end = time.monotonic() + LIMIT.total_seconds()
    while True:
        try:
            socket.create_connection((address, port), timeout=max(end - time.monotonic(), 1)).close()
            return
        except OSError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.2)


def _wait_for_all(store: Store, number: int) -> None:
    """Wait until `number` processes have called this; raise RuntimeError after `LIMIT`."""
    if store.add("processes that came", 1) == number:
        store.set("all came", "")
    store.wait(["all came"], LIMIT)


@contextmanager
def silent_standard_error() -> Iterator[None]:
    """Drop what libraries write to standard error within the block, even past `sys.stderr`."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123 (no path of the user's)
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
