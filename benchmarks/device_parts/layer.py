"""Measure one layer of a network, eager and compiled, by its operations or kernels."""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from device_parts.models import Model
from device_parts.recording import Recorder
from device_parts.timing import Kernel, kernels_of, profiled
from device_parts.timing import measure as timed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogvideox_sat.network.layer_runner import LayerContext, RunLayer
from sgm.compilation import compile_network

SHOWN = 14  # number of the longest operations or kernels to show
NOT_ELEMENTWISE = ("mm", "linear", "attention", "bmm", "convolution")
AHEAD = 200_000_000  # cycles that the GPU waits, so that all launches are in its queue before it starts


def measure(recorder: Recorder, model: str) -> None:
    """Write a row for the layer, eager and compiled, and rows for its parts."""
    described = Model(model, layers=1)
    with torch.no_grad():
        with recorder.attempt(f"{model}, eager"):
            measure_eager(recorder, model, described, *captured_layer(recorder, described))
        with recorder.attempt(f"{model}, compiled"):
            measure_compiled(recorder, model, described, *captured_layer(recorder, described, compiled=True))


def captured_layer(recorder: Recorder, model: Model, compiled: bool = False) -> tuple[RunLayer, Tensor]:
    """Return a network's layer as a function of tokens (b, n, d), and its input tokens."""
    network = model.network(recorder)
    if compiled:
        from torch._inductor import config

        config.cpp.enable_kernel_profile = True  # names of kernels in profiles of a CPU
        compile_network(network)
    captured: list[Any] = []

    def around(run: RunLayer, hidden: Tensor, context: LayerContext) -> Tensor:
        captured[:] = [run, hidden.clone()]
        return hidden

    # Outermost, since the choice of the attention's kernel, also such a function, belongs to the layer.
    network.layer_runner.add(around, outermost=True)
    x, timesteps, text = model.inputs(recorder)
    network(x, timesteps, text)
    run, hidden = captured
    return run, hidden


def measure_eager(recorder: Recorder, name: str, model: Model, run: RunLayer, hidden: Tensor) -> None:
    """Write time, launches and bytes of the layer, and a row for each of its operations."""
    result = timed(run, recorder.device, repeats=5, prepare=hidden.clone)
    profiler = profiled(lambda: run(hidden.clone()), recorder.device)
    recorder.keep_trace(profiler, "layer_eager")
    operations = Operations(recorder.device)
    given = hidden.clone()
    if recorder.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda._sleep(AHEAD)
    with operations:
        run(given)
    calls = operations.kernels()
    on_gpu = launches_of(kernels_of(trace_of(recorder, "layer_eager"), recorder.device))
    moved = sum(each.gigabytes or 0 for each in calls if not any(word in each.name for word in NOT_ELEMENTWISE))
    values = {
        "ms": 1000 * result.seconds,
        "launches": on_gpu if recorder.device.type == "cuda" else len(calls),
        "elementwise U": moved * 1e9 * 2 / hidden.element_size() / model.work.unit,
        "first call s": result.first,
    }
    recorder.row(f"{name}, eager", values)
    write_kernels(recorder, "eager", calls)


def measure_compiled(recorder: Recorder, name: str, model: Model, run: RunLayer, hidden: Tensor) -> None:
    """Write time and launches of the compiled layer, and a row for each of its kernels."""
    result = timed(run, recorder.device, repeats=5, prepare=hidden.clone)
    profiler = profiled(lambda: run(hidden.clone()), recorder.device)
    recorder.keep_trace(profiler, "layer_compiled")
    kernels = kernels_of(trace_of(recorder, "layer_compiled"), recorder.device)
    fused = sum(each.gigabytes or 0 for each in kernels)
    values: dict[str, Any] = {"ms": 1000 * result.seconds, "first call s": result.first}
    if recorder.device.type == "cuda":  # profiles of a CPU only have fused kernels
        values["launches"] = launches_of(kernels)
    if fused:
        values["elementwise U"] = fused * 1e9 * 2 / hidden.element_size() / model.work.unit
    recorder.row(f"{name}, compiled", values)
    write_kernels(recorder, "compiled", kernels)


def launches_of(kernels: list[Kernel]) -> int | None:
    """Return the launches of the layer, without the copy of its input.

    None: the profiler recorded none.
    """
    return len(kernels) - 1 if kernels else None


def trace_of(recorder: Recorder, name: str) -> dict[str, Any]:
    return json.loads((recorder.work / f"{name}.json").read_text())


def write_kernels(recorder: Recorder, how: str, kernels: list[Kernel]) -> None:
    """Write a row for each of the longest kernels, by name."""
    by_name: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel)
    spent = {name: sum(each.microseconds for each in group) for name, group in by_name.items()}
    for name in sorted(spent, key=lambda each: -spent[each])[:SHOWN]:
        gigabytes = sum(each.gigabytes or 0 for each in by_name[name])
        values: dict[str, Any] = {"calls": len(by_name[name]), "µs": float(spent[name])}
        if gigabytes and spent[name]:
            values["GB/s"] = gigabytes / spent[name] * 1e6
        recorder.row(f"{how}: {name[:70]}", values, table="kernels")


class Operations(TorchDispatchMode):
    """Times all operations of PyTorch within it, and counts the bytes they read and write.

    Each operation reads its arguments once and writes its result once.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.calls: list[tuple[str, Callable[[], float], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        begin = self.mark()
        result = func(*args, **kwargs)
        end = self.mark()
        if not is_view(func):
            read = [each for each in tree_leaves((args, {**kwargs, "out": None})) if isinstance(each, Tensor)]
            written = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
            moved = sum(size(each) for each in (*read, *written))
            self.calls.append((str(func.overloadpacket).removeprefix("aten."), lambda: self.between(begin, end), moved))
        return result

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Return the seconds between two marks."""
        return begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin

    def kernels(self) -> list[Kernel]:
        """Return the operations in their order."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return [Kernel(name, 1e6 * seconds(), moved / 1e9) for name, seconds, moved in self.calls]


def is_view(func: Any) -> bool:
    """Return whether an operation only returns a view of its input."""
    returned = [each.alias_info for each in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor, or of its storage if it is expanded."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
