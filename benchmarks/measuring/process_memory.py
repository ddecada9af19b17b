"""Time and memory of other processes, looked at again and again while they run. Linux only; PyTorch is not imported."""

import os
import re
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.01  # seconds between two looks at a process


@dataclass
class Usage:
    """Of one process: seconds, those of them on a processor, and the most GiB of resident and of anonymous memory."""

    seconds: float = 0.0
    busy: float = 0.0
    resident: float = 0.0
    anonymous: float = 0.0


def watched(command: Sequence[str], folder: Path | None = None, environment: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end, and return what it used.

    Args:
        folder: in which it runs.
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
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def gib(status: str, entry: str) -> float:
    """Return the GiB that an entry of `/proc/PID/status` says."""
    match = re.search(rf"{entry}:\s*(\d+) kB", status)
    return int(match[1]) / 2**20 if match else 0.0  # a process that has ended has no such line
