"""Running a function of a test in several processes that are joined by torch.distributed."""

import importlib.util
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import processes

TIMEOUT = 300  # seconds; the longest takes 30 alone, and beside other tests on two cores four times that


class Running:
    """The test that runs, as `conftest.py` says."""

    is_marked = True  # outside of pytest


def check_marked() -> None:
    """Raise AssertionError where several processes are about to start in a test that is not marked `distributed`."""
    assert Running.is_marked, "this test starts several processes: mark it with pytest.mark.distributed"


def run_distributed(function: Callable, world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` in `world_size` processes joined by gloo, and return its results in the order of ranks.

    `function` is any top-level function of a file; arguments and results are pickled. An exception in one of the
    processes is raised here as a RuntimeError with its traceback.
    """
    check_marked()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "call").write_bytes(pickle.dumps((function.__code__.co_filename, function.__name__, args)))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        ranks = [processes.start([__file__, folder, rank, world_size], env=environment) for rank in range(world_size)]
        try:
            for process in ranks:
                process.wait(TIMEOUT)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
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
    # Written in one step: the reader must never see half a result.
    Path(folder, f"partial{rank}").write_bytes(pickle.dumps(outcome))
    Path(folder, f"partial{rank}").rename(Path(folder, f"result{rank}"))
    if outcome[0]:
        if dist.is_initialized():  # else the function has left the group by itself
            dist.barrier()
            dist.destroy_process_group()
    else:
        os._exit(1)  # the others may be waiting for this rank: leave at once


if __name__ == "__main__":
    _process(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
