"""Measure the free memory of the machine or of this process's container.

This module imports no PyTorch.
"""

import re
from contextlib import suppress
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def free_host_memory() -> int | None:
    """Return the bytes of memory that this process can still take; None if unknown.

    Memory used for caching files counts as free, because the system frees it when needed.
    """
    free = [bytes_ for bytes_ in (_free_in_machine(), *_free_in_containers()) if bytes_ is not None]
    return max(min(free), 0) if free else None


def _free_in_machine() -> int | None:
    with suppress(OSError):
        if found := re.search(r"^MemAvailable:\s+(\d+) kB", MEMINFO.read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return None


def _free_in_containers() -> list[int]:
    """Return the bytes left for each limit of a control group of this process.

    The groups around it are included.
    """
    free = []
    for folder in _control_groups():
        for limit, usage, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with suppress(OSError, ValueError):  # "max" is not a number and means no limit
                used = int((folder / usage).read_text()) - _statistic(folder / "memory.stat", cache)
                free.append(int((folder / limit).read_text()) - used)
    return free


def _control_groups() -> list[Path]:
    roots = [CGROUPS, CGROUPS / "memory"]
    found = list(roots)
    with suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            name = Path(line.rpartition(":")[2].lstrip("/"))
            found += [root / part for root in roots for part in (name, *name.parents) if part != Path()]
    return list(dict.fromkeys(found))


def _statistic(file: Path, name: str) -> int:
    found = re.search(rf"^{name} (\d+)$", file.read_text(), re.MULTILINE)
    return int(found[1]) if found else 0
