"""Run functions and commands of tests in several processes joined by torch.distributed."""

import importlib.util
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import processes

TIMEOUT = 300  # seconds; the longest test takes 30 alone, and four times that beside others on two cores


class Running:
    """The running test, as set by `conftest.py`."""

    is_marked = True  # outside of pytest


def check_marked() -> None:
    """Check that the test is marked `distributed` before it starts several processes.

    Raises:
        AssertionError: the mark is missing.
    """
    assert Running.is_marked, "this test starts several processes; mark it with pytest.mark.distributed"


def free_port() -> int:
    """Return the number of a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environments_of_ranks(world_size: int) -> list[dict[str, str]]:
    """Return the environment of each process of a run, in rank order, as a launcher sets it."""
    run = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    run |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    return [own_imports() | run | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def own_imports() -> dict[str, str]:
    """Return the environment with this process's import path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@contextmanager
def killed_at_the_end(ranks: Sequence[processes.Process | subprocess.Popen]) -> Iterator[None]:
    """Kill those of the processes that still run after the block."""
    try:
        yield
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def run_distributed(function: Callable, world_size: int, *args: Any) -> list[Any]:
    """Return the results of `function(*args)` in `world_size` processes, in rank order.

    The processes are joined by gloo. `function` is any top-level function of a file; arguments and results are pickled.

    Raises:
        RuntimeError: an exception in a process, with its traceback.
    """
    check_marked()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "call").write_bytes(pickle.dumps((function.__code__.co_filename, function.__name__, args)))
        environment = own_imports() | {"OMP_NUM_THREADS": "1"}
        ranks = [processes.start([__file__, folder, rank, world_size], env=environment) for rank in range(world_size)]
        with killed_at_the_end(ranks):
            for process in ranks:
                process.wait(TIMEOUT)
        outcomes = []
        for rank in range(world_size):
            path = Path(folder, f"result{rank}")
            outcomes.append(pickle.loads(path.read_bytes()) if path.exists() else (False, f"rank {rank} died"))
    failures = [error for success, error in outcomes if not success]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [result for _, result in outcomes]


def _process(folder: str, rank: int, world_size: int) -> None:
    import torch.distributed as dist

    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=TIMEOUT), rank=rank, world_size=world_size)
    try:
        filename, name, args = pickle.loads(Path(folder, "call").read_bytes())
        spec = importlib.util.spec_from_file_location(Path(filename).stem, filename)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        outcome = True, getattr(module, name)(*args)
    except BaseException:
        outcome = False, f"rank {rank}: {traceback.format_exc()}"
    # Written atomically, so that the reader never sees half a result.
    Path(folder, f"partial{rank}").write_bytes(pickle.dumps(outcome))
    Path(folder, f"partial{rank}").rename(Path(folder, f"result{rank}"))
    if outcome[0]:
        if dist.is_initialized():  # the function may have left the group itself
            dist.barrier()
            dist.destroy_process_group()
    else:
        os._exit(1)  # other ranks may be waiting for this one, so exit at once


if __name__ == "__main__":
    _process(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
