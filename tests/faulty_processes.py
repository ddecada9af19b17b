"""Run a command in two processes with a fault in one of them."""

import time
from collections.abc import Sequence
from pathlib import Path

import processes
from distributed import check_marked, environments_of_ranks, killed_at_the_end

LEFT_ALONE = 60  # seconds within which a process ends after the other one


# Runs a command with a fault in the second call of the network in process 1, or of the text encoder in process 0.
FAULTS = """
import os, signal, sys
import torch
import dit_video_concat
from sgm.modules.encoders import modules

fault, rank, calls = sys.argv.pop(1), os.environ["RANK"], []
def faulty(function, where, call):
    def run(*args, **kwargs):
        calls.append(1)
        if rank == where and len(calls) == call:
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "terminated":
                os.kill(os.getpid(), signal.SIGTERM)  # training finishes its step first
            else:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return function(*args, **kwargs)
    return run
if fault == "full in the text encoder":
    modules.FrozenT5Embedder.forward = faulty(modules.FrozenT5Embedder.forward, "0", 2)
else:
    dit_video_concat.DiffusionTransformer.forward = faulty(dit_video_concat.DiffusionTransformer.forward, "1", 2)
if "--train_data" in sys.argv:
    from train_video import main
else:
    from sample_video import main
sys.exit(main(sys.argv[1:]))
"""


def ends_of_ranks(folder: Path, fault: str, arguments: Sequence[object]) -> list[tuple[int, str]]:
    """Return the exit code and the output of each of two processes without a launcher.

    Args:
        fault: killed, terminated, full (of memory), or full in the text encoder.
        arguments: of the training command if `--train_data` is among them, otherwise of the sampling command.
    """
    check_marked()
    (folder / "program.py").write_text(FAULTS)
    ranks: list[processes.Process] = []
    for rank, environment in enumerate(environments_of_ranks(2)):
        with (folder / f"{fault}{rank}.log").open("w") as log:
            words = [folder / "program.py", fault, *arguments]
            ranks.append(processes.start(words, env=environment, stdout=log, stderr=log))
    with killed_at_the_end(ranks):
        wait_for_one(ranks, 180)
        for process in ranks:
            process.wait(LEFT_ALONE)
    return [
        (process.returncode or 0, (folder / f"{fault}{rank}.log").read_text()) for rank, process in enumerate(ranks)
    ]


def wait_for_one(running: list[processes.Process], seconds: float) -> None:
    """Wait until one of the processes has ended."""
    end = time.monotonic() + seconds
    while all(process.poll() is None for process in running):
        assert time.monotonic() < end, "both processes hang"
        time.sleep(0.05)
