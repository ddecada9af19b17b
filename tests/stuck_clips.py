"""A decoder that never returns.

The decoder is native code that holds the interpreter's lock, so that no signal handler runs.
"""

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

# Patches the reader in the process and in those that it forks, and runs a command. Arguments: the folder, a module with
# `main`, and its arguments.
PROGRAM = """
import importlib, os, sys
from pathlib import Path
import stuck_clips
stuck_clips.patch(Path(sys.argv[1]))
sys.exit(importlib.import_module(sys.argv[2]).main(sys.argv[3:]))
"""


def hang() -> None:
    """Block forever; only SIGKILL ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.PyDLL(None).sleep(100_000)


def crash() -> None:
    """End the process like a decoder's crash, without pytest's report."""
    faulthandler.disable()
    os.abort()


def patch(folder: Path) -> None:
    """Make clips hang while `folder` has files of their names.

    `NAME` hangs reading, `probe-NAME` hangs probing, `crash-NAME` ends the process.
    """
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
    """Return the environment of a process that runs `PROGRAM`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def run(folder: Path, module: str, *arguments: str, ranks: int = 1) -> str:
    """Return the output of a successful run of the command of `module` with stuck clips.

    Args:
        folder: marks the clips that get stuck.
        ranks: number of processes; torchrun starts more than one.
    """
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
