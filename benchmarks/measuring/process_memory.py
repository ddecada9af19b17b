"""Measure time and memory of other processes while they run.

Linux only; PyTorch is not imported.
"""

import os
import re
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.01  # seconds between two samples of a process


@dataclass
class Usage:
    """Seconds, processor seconds, and peak GiB of resident and anonymous memory of a process."""

    seconds: float = 0.0
    busy: float = 0.0
    resident: float = 0.0
    anonymous: float = 0.0


def watched(command: Sequence[str], folder: Path | None = None, environment: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end, and return its use of time and memory.

    Args:
        folder: its working directory.
        environment: variables that are added to those of this process.
    """
    usage, start, busy = Usage(), time.perf_counter(), processor_seconds()
    with subprocess.Popen(command, env={**os.environ, **(environment or {})}, cwd=folder) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            usage.resident = max(usage.resident, gib(status, "VmHWM"))
            usage.anonymous = max(usage.anonymous, gib(status, "RssAnon"))
            time.sleep(INTERVAL)
    usage.seconds, usage.busy = time.perf_counter() - start, processor_seconds() - busy
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage


def processor_seconds() -> float:
    """Return the processor seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def gib(status: str, entry: str) -> float:
    """Return the GiB of an entry of `/proc/PID/status`."""
    match = re.search(rf"{entry}:\s*(\d+) kB", status)
    return int(match[1]) / 2**20 if match else 0.0  # a process that has ended has no such line
