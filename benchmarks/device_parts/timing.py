"""Measure seconds, memory and profiles of functions on a device."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from harness import peak_memory
from torch.profiler import ProfilerActivity, profile


class Measured(NamedTuple):
    """Measurements of a function.

    Attributes:
        seconds: the median of its runs.
        gib: peak memory: PyTorch's on a GPU, including earlier tensors; that of the process on a CPU.
        first: seconds of the warm-up run, in which a compiled function is compiled.
    """

    seconds: float
    gib: float
    first: float


def measure(
    run: Callable[[Any], object], device: torch.device, repeats: int, prepare: Callable[[], Any] = int
) -> Measured:
    """Return time and memory of `run(prepare())`; only `run` counts for the time.

    On a GPU the time is that of its events.
    """
    first = _seconds(run, prepare(), device)
    times: list[float] = []

    def repeat() -> None:
        times.extend(_seconds(run, prepare(), device) for _ in range(repeats))

    gib = peak_memory(repeat, device)
    return Measured(statistics.median(times), gib, first)


def _seconds(run: Callable[[Any], object], given: Any, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run(given)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run(given)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def profiled(run: Callable[[], object], device: torch.device) -> profile:
    """Return the profile of one run, after one run without a profile."""
    activities = [ProfilerActivity.CPU]
    run()
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities, record_shapes=True) as profiler:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return profiler


class Kernel(NamedTuple):
    """One launch of a kernel.

    Attributes:
        gigabytes: size of its arguments, each tensor once; None if the profile does not have it.
    """

    name: str
    microseconds: float
    gigabytes: float | None


# Bytes per element, by the names of types in traces.
ELEMENTS = {"c10::BFloat16": 2, "c10::Half": 2, "float": 4, "double": 8, "int": 4, "long int": 8, "bool": 1}
KERNEL_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}


def kernels_of(trace: dict[str, Any], device: torch.device) -> list[Kernel]:
    """Return the launches in a profile written by `export_chrome_trace`.

    On a CPU they are the kernels of compiled code.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    calls = [event for event in events if event.get("cat") == "cpu_op"]
    if device.type != "cuda":
        return [Kernel(each["name"], each["dur"], _gigabytes(each)) for each in calls if "cpp_fused" in each["name"]]
    by_id = {event["args"].get("External id"): event for event in calls}
    launches = [event for event in events if event.get("cat") in KERNEL_CATEGORIES]
    return [Kernel(each["name"], each["dur"], _of_caller(each, by_id)) for each in launches]


def _of_caller(launch: dict[str, Any], calls: dict[Any, dict[str, Any]]) -> float | None:
    """Return the gigabytes of a fused kernel.

    Its caller has the kernel's name and gets all its tensors.
    """
    call = calls.get(launch["args"].get("External id"))
    return _gigabytes(call) if call is not None and launch["name"].startswith("triton") else None


def _gigabytes(call: dict[str, Any]) -> float | None:
    shapes, types = call["args"].get("Input Dims"), call["args"].get("Input type")
    if not shapes or not types:
        return None
    total = 0
    for shape, kind in zip(shapes, types, strict=False):
        if kind in ELEMENTS and shape and all(isinstance(side, int) for side in shape):
            count = ELEMENTS[kind]
            for side in shape:
                count *= side
            total += count
    return total / 1e9 if total else None
