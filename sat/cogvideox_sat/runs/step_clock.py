"""Measure the time and the memory that steps take."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


class StepClock:
    """Rates of the steps, from the wall clock alone: the device is never waited for.

    A device works behind the program, which catches up with it whenever a value is fetched. Rates over several steps
    are right; those of a single one may not be.
    """

    def __init__(self) -> None:
        self._start_over()

    def _start_over(self) -> None:
        self._start = time.perf_counter()
        self._waited = self._paused = 0.0
        self._steps = self._samples = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around fetching data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no part of a step, such as evaluations and checkpoints: the clock stands still."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def step(self, samples: int) -> None:
        """An optimizer step is done; it took `samples` samples."""
        self._steps += 1
        self._samples += samples

    def rates(self) -> dict[str, float]:
        """Since the last call: `samples_per_second`, `seconds_per_step`, and `data_wait_share`, the share of the time
        that was spent waiting for data. Empty if there was no step; they then count into the next call's."""
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
    """The most memory in use so far, in GiB: by PyTorch on a CUDA `device`, else by this process.

    NaN where the operating system does not say.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20  # given in KiB
    return math.nan
