"""Run units one after the other, each in its own process, within a budget of seconds.

If a unit crashes, hangs or fills the memory, only its rows are missing. PyTorch is not imported.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from device_parts.results import DONE, FAILED, SKIPPED, Results
from device_parts.units import PARTS, Unit

logger = logging.getLogger("device_check")

CHILD = Path(__file__).with_name("child.py")
LOG = "log.txt"
GRACE = 3.0  # seconds between SIGTERM and SIGKILL


class UnitRunner:
    """Runs units and writes how they end.

    Args:
        results: the file of rows.
        settings: settings of the child processes: device, size and folders.
        deadline_of: the time by `clock` at which a part must end. The first unit of a part may take time from later
            parts, so that each has a result.
        log: the file for the output of units.
    """

    def __init__(
        self,
        results: Results,
        settings: Mapping[str, Any],
        deadline_of: Mapping[str, float],
        log: Path,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.results, self.settings, self.deadline_of, self.log, self.clock = results, settings, deadline_of, log, clock
        self.begun: set[str] = set()  # parts

    def run(self, unit: Unit) -> str:
        """Run one unit; return its state."""
        deadline = self.deadline_of[unit.part] if unit.part in self.begun else max(self.deadline_of.values())
        left = deadline - self.clock()
        if left < unit.cost:
            return self.end(unit, SKIPPED, f"takes about {unit.cost:.0f} s, {max(left, 0):.0f} s are left for its part")
        logger.info("%s (about %.0f s)", unit.name, unit.cost)
        self.begun.add(unit.part)
        start = self.clock()
        code = self.start_and_wait(unit, limit=left if self.settings["size"] == "toy" else min(left, unit.most))
        seconds = self.clock() - start
        if code == 0:
            return self.end(unit, DONE, seconds=seconds)
        return self.end(unit, FAILED, self.reason(unit, code, seconds), seconds)

    def end(self, unit: Unit, state: str, why: str = "", seconds: float = 0.0) -> str:
        """Write how a unit ended; return its state."""
        logger.info("%s: %s%s", unit.name, state, f", {why}" if why else f" in {seconds:.0f} s")
        self.results.append({"unit": unit.name, "state": state, "why": why, "seconds": round(seconds, 1)})
        return state

    def start_and_wait(self, unit: Unit, limit: float) -> int | None:
        """Return the exit code of a unit's process, None after `limit` seconds."""
        task = {"unit": unit.name, "target": unit.target, "options": unit.options, "results": str(self.results.file)}
        command = [sys.executable, str(CHILD), json.dumps({**self.settings, **task})]
        with self.log.open("a") as log:
            log.write(f"\n======== {unit.name}\n")
            log.flush()
            # A process group, not a session, so that ending this command's session also ends the units.
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, process_group=0)
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                end_group(process)

    def reason(self, unit: Unit, code: int | None, seconds: float) -> str:
        """Return the reason for a unit's failure, on one line."""
        if code is None:
            return f"did not end within {seconds:.0f} s"
        if code < 0:
            return f"ended by {signal.Signals(-code).name} after {seconds:.0f} s"
        return self.last_line(unit) or f"exit code {code}"

    def last_line(self, unit: Unit) -> str:
        """Return the last line that a unit printed."""
        printed = self.log.read_text("utf-8", "replace").rpartition(f"======== {unit.name}\n")[2].strip()
        return printed.splitlines()[-1].strip()[:300] if printed else ""


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        if process.poll() is not None and number == signal.SIGTERM:
            continue  # already ended; its children have nothing to save
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def deadlines(parts: Sequence[str], budget: float, now: float) -> dict[str, float]:
    """Return the time at which each part must end.

    The chosen parts share the budget by their weights.
    """
    whole = sum(PARTS[part] for part in parts)
    times, used = {}, 0.0
    for part in PARTS:
        if part in parts:
            used += PARTS[part] / whole * budget
            times[part] = now + used
    return times
