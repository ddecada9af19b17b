"""A decoder that never returns: native code that holds the interpreter's lock, so that no signal handler runs."""

import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
from distributed import check_marked

TIMEOUT = 600  # seconds

# Patches the reader as `patched` says, in the process that runs it and in those that it forks, and runs a command:
# the folder, then a module with `main`, then its arguments.
PROGRAM = """
import importlib, os, sys
from pathlib import Path
import stuck_clips
stuck_clips.patch(Path(sys.argv[1]))
sys.exit(importlib.import_module(sys.argv[2]).main(sys.argv[3:]))
"""


def hang() -> None:
    """Never return, whatever signal comes but SIGKILL."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.PyDLL(None).sleep(100_000)


def crash() -> None:
    """End the process as a decoder's mistake does, without the report that pytest would print of it."""
    faulthandler.disable()
    os.abort()


def patch(folder: Path) -> None:
    """Let clips hang while their names are files in `folder`: `NAME` when they are read, `probe-NAME` when they are
    looked at, `crash-NAME` to end the process instead."""
    import data_video
    from cogvideox_sat.clips import probing as clip_probing

    data_video.read_clip = _hanging(data_video.read_clip, folder, "")
    clip_probing.probe = _hanging(clip_probing.probe, folder, "probe-")


def _hanging(function: Callable[..., Any], folder: Path, prefix: str) -> Callable[..., Any]:
    def wrapped(source: Any, *args: Any, **options: Any) -> Any:
        name = Path(source.name).name
        if (folder / f"{prefix}{name}").exists():
            hang()
        if not prefix and (folder / f"crash-{name}").exists():
            os.kill(os.getpid(), signal.SIGSEGV)
        return function(source, *args, **options)

    return wrapped


def environment() -> dict[str, str]:
    """Variables for a process that runs `PROGRAM`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def run(folder: Path, module: str, *arguments: str, ranks: int = 1) -> str:
    """Run the command of `module`, where clips that `folder` marks get stuck, to its end, which must be a good one;
    what it printed. torchrun starts several processes."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    launcher = []
    if ranks > 1:
        check_marked()
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, program, folder, module, *arguments]
    done = processes.run(command, stderr=subprocess.STDOUT, env=environment(), timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout
