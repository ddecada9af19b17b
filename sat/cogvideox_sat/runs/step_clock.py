"""Measure the time and the memory of steps."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


class StepClock:
    """Rates of steps by the wall clock, without waiting for the device.

    A device works asynchronously; the program waits for it whenever a value is fetched. Rates over several steps are
    correct; those of a single step may not be.
    """

    def __init__(self) -> None:
        self._start_over()

    def _start_over(self) -> None:
        self._start = time.perf_counter()
        self._waited = self._paused = 0.0
        self._steps = self._samples = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time within the block as waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the clock within the block, for example during evaluation or checkpointing."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def step(self, samples: int) -> None:
        """Record an optimizer step that took `samples` samples."""
        self._steps += 1
        self._samples += samples

    def rates(self) -> dict[str, float]:
        """Return the rates since the last call; empty if no step was made.

        The rates are `samples_per_second`, `seconds_per_step`, and `data_wait_share`, the share of the time spent
        waiting for data. Without a step, the time counts for the next call.
        """
        if not self._steps:
            return {}
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        rates = {
            "samples_per_second": self._samples / seconds,
            "seconds_per_step": seconds / self._steps,
            "data_wait_share": min(self._waited / seconds, 1.0),
        }
        self._start_over()
        return rates


def peak_memory(device: torch.device | str) -> float:
    """Return the peak memory so far in GiB: of PyTorch on a GPU, else of this process.

    NaN if the operating system does not report it.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20  # given in KiB
    return math.nan
