"""Attention alone: each kernel that PyTorch has, and FlashAttention 3 where it is installed."""

import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel

from device_parts.floating_point import attention_flops
from device_parts.recording import Recorder
from device_parts.timing import measure as timed
from device_parts.timing import profiled
from sgm.errors import one_line

SHAPES = {"5B": (2, 48, 17776, 64), "2B": (2, 30, 17776, 64)}  # batch, heads, tokens, head_dim
TOY_SHAPES = {"toy": (2, 5, 224, 32)}
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ON_CPU = ("flash", "math")
KEEPS_WEIGHTS = "math"  # n² of them, which may not fit
# Packages with FlashAttention 3 for (b, n, heads, d), the second without a backward pass.
FLASH_3 = ("flash_attn_interface", "fa3_fwd_interface")
BACKWARD_TOO = 3.5  # of the FLOP of the forward pass, in kernels that recompute the weights

KERNEL_NAME = 60  # characters of a name that are shown

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure(recorder: Recorder) -> None:
    """Write a row for each shape and kernel."""
    for shape_name, shape in (TOY_SHAPES if recorder.toy else SHAPES).items():
        for name, attend in kernels(recorder).items():
            with recorder.attempt(f"{shape_name}, {name}", may_not_fit=name == KEEPS_WEIGHTS):
                measure_kernel(recorder, f"{shape_name}, {name}", shape, attend)


def kernels(recorder: Recorder) -> dict[str, Attend]:
    """Return what can be tried on the device, by name."""
    names = ON_CPU if recorder.device.type == "cpu" else BACKENDS
    found: dict[str, Attend] = {"auto": F.scaled_dot_product_attention}
    found |= {name: only(BACKENDS[name]) for name in names}
    package = next((name for name in FLASH_3 if importlib.util.find_spec(name)), None)
    if package and recorder.device.type == "cuda":
        found["flash3"] = flash_3(package)
    else:
        recorder.note("FlashAttention 3 was not measured: " + ("a CPU has none" if package else "it is not installed"))
    return found


def only(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def flash_3(package: str) -> Attend:
    compute = importlib.import_module(package).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compute(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def measure_kernel(recorder: Recorder, row: str, shape: tuple[int, int, int, int], attend: Attend) -> None:
    """Write the row of one kernel: forward at the batch of the shape, forward and backward at batch 1."""
    q, k, v = heads_of(recorder, shape)
    flops = attention_flops(*shape)
    with torch.no_grad():
        forward = timed(lambda _: attend(q, k, v), recorder.device, repeats=5).seconds
        kernel = longest_kernel(recorder, lambda: attend(q, k, v))
    values = {"forward ms": 1000 * forward, "forward TFLOP/s": flops / forward / 1e12, "kernel": kernel}
    try:
        both = forward_and_backward(recorder, (1, *shape[1:]), attend)
        values["forward+backward ms, b=1"] = 1000 * both
        values["TFLOP/s of both"] = BACKWARD_TOO * flops / shape[0] / both / 1e12
    except (RuntimeError, NotImplementedError) as error:  # memory, or a kernel without a backward pass
        recorder.note(f"{row}: no backward pass: {one_line(str(error).strip(), 150)}")
    recorder.row(row, values)


def heads_of(recorder: Recorder, shape: tuple[int, int, int, int]) -> list[Tensor]:
    """Return q, k, v (b, heads, n, d) as a network has them: views of one (b, n, 3·heads·d)."""
    b, heads, n, d = shape
    joint = torch.randn(b, n, 3, heads, d, device=recorder.device, dtype=recorder.dtype)
    return [part.transpose(1, 2) for part in joint.unbind(2)]


def forward_and_backward(recorder: Recorder, shape: tuple[int, int, int, int], attend: Attend) -> float:
    """Return the seconds of both passes."""
    inputs = [tensor.contiguous().requires_grad_() for tensor in heads_of(recorder, shape)]
    gradient = torch.randn_like(inputs[0])

    def run(_: object) -> None:
        torch.autograd.grad(attend(*inputs), inputs, gradient)

    return timed(run, recorder.device, repeats=3).seconds


def longest_kernel(recorder: Recorder, run: Callable[[], object]) -> str:
    """Return the name of the kernel that takes most of the time."""
    events = profiled(run, recorder.device).events()
    if recorder.device.type == "cuda":
        events = [each for each in events if each.device_type == DeviceType.CUDA]
    longest = max(events, key=lambda each: each.self_cpu_time_total or each.time_range.elapsed_us())
    return longest.name[:KERNEL_NAME]
