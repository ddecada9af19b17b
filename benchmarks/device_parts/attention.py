"""Measure attention alone, by each kernel that `--attention` names."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from device_parts.floating_point import attention_flops
from device_parts.recording import Recorder
from device_parts.timing import measure as timed
from device_parts.timing import profiled
from torch import Tensor
from torch.autograd import DeviceType

from cogvideox_sat.network.attention_choice import AUTO, BACKENDS, CPU_PRIORITY, FLASH3, choose_attention
from sgm.attention_kernels import KERNELS
from sgm.errors import UserError, one_line
from sgm.flash_attention3 import is_installed

SHAPES = {"5B": (2, 48, 17776, 64), "2B": (2, 30, 17776, 64)}  # batch, heads, tokens, head_dim
TOY_SHAPES = {"toy": (2, 5, 224, 32)}
PYTORCH = "PyTorch's choice"
KEEPS_WEIGHTS = "math"  # its n² weights may not fit into memory
BACKWARD_TOO = 3.5  # FLOP of both passes relative to the forward pass, in kernels that recompute weights
KERNEL_NAME = 60  # characters of a kernel's name to show

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Shape = tuple[int, int, int, int]


def measure(recorder: Recorder) -> None:
    """Write a row for each shape and kernel of `--attention`, and for PyTorch's own choice."""
    names = CPU_PRIORITY if recorder.device.type == "cpu" else BACKENDS
    # FlashAttention 3 last, since it may replace PyTorch's version 2 for the rest of the process.
    for name in (AUTO, PYTORCH, *names, FLASH3):
        if name == FLASH3 and not is_installed(gradients=False):
            recorder.note("flash3: FlashAttention 3 is not installed")
            continue
        for shape_name, shape in (TOY_SHAPES if recorder.toy else SHAPES).items():
            with recorder.attempt(f"{shape_name}, {name}", may_not_fit=name == KEEPS_WEIGHTS):
                measure_kernel(recorder, f"{shape_name}, {name}", shape, name)


def kernel_of(recorder: Recorder, name: str, head_dim: int, gradients: bool) -> Attend:
    """Return the function of a kernel as the network calls it.

    Raises:
        UserError: the kernel does not support such tensors.
    """
    if name == PYTORCH:
        return F.scaled_dot_product_attention
    choice = choose_attention(name, recorder.device, recorder.dtype, head_dim, gradients)
    compute = choice.function or KERNELS["softmax"]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with choice.applied():
            return compute(q, k, v)

    return attend


def measure_kernel(recorder: Recorder, row: str, shape: Shape, name: str) -> None:
    """Write a kernel's row: forward at the shape's batch, forward and backward at batch 1."""
    q, k, v = heads_of(recorder, shape)
    attend = kernel_of(recorder, name, shape[-1], gradients=False)
    flops = attention_flops(*shape)
    with torch.no_grad():
        forward = timed(lambda _: attend(q, k, v), recorder.device, repeats=5).seconds
        kernel = longest_kernel(recorder, lambda: attend(q, k, v))
    values = {"forward ms": 1000 * forward, "forward TFLOP/s": flops / forward / 1e12, "kernel": kernel}
    try:
        both = forward_and_backward(recorder, (1, *shape[1:]), name)
        values["forward+backward ms, b=1"] = 1000 * both
        values["TFLOP/s of both"] = BACKWARD_TOO * flops / shape[0] / both / 1e12
    except (RuntimeError, UserError) as error:  # memory, or a kernel without a backward pass
        recorder.note(f"{row}: no backward pass: {one_line(str(error).strip(), 150)}")
    recorder.row(row, values)


def heads_of(recorder: Recorder, shape: Shape) -> list[Tensor]:
    """Return q, k, v (b, heads, n, d) as a network has them: views of one (b, n, 3·heads·d)."""
    b, heads, n, d = shape
    joint = torch.randn(b, n, 3, heads, d, device=recorder.device, dtype=recorder.dtype)
    return [part.transpose(1, 2) for part in joint.unbind(2)]


def forward_and_backward(recorder: Recorder, shape: Shape, name: str) -> float:
    """Return the seconds of the forward and the backward pass."""
    attend = kernel_of(recorder, name, shape[-1], gradients=True)
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
    longest = max(events, key=lambda each: each.self_cpu_time_total or each.time_range.elapsed_us(), default=None)
    return longest.name[:KERNEL_NAME] if longest else "not profiled"
