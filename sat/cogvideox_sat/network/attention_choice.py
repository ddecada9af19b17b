"""Choose the attention kernel of a network, and test it before any weights are read.

The kernel is chosen by name or by device. PyTorch's own choice changes with its version, and with it the speed and the
last digits of the results. On a GPU, the order in `PRIORITY` decides instead. On a CPU, PyTorch's own choice is kept.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cogvideox_sat.network.layer_runner import LayerContext, RunLayer
from sgm import flash_attention3
from sgm.attention_kernels import KERNELS, AttentionKernel
from sgm.errors import UserError

AUTO, FLASH3 = "auto", "flash3"
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Keys: the lowest major compute capability for which the order applies. On Hopper, with 64 channels per head, cuDNN's
# kernel is the fastest one of PyTorch: 413 TFLOP/s, FlashAttention 2 324 TFLOP/s (published for the H100).
PRIORITY: dict[int, tuple[str, ...]] = {
    9: ("cudnn", "flash", "efficient", "math"),
    0: ("flash", "cudnn", "efficient", "math"),
}
CPU_PRIORITY = ("flash", "math")
TRIED_TOKENS, TRIED_HEADS = 128, 2


@dataclass(frozen=True)
class AttentionChoice:
    """The attention kernel of a network on a device.

    Attributes:
        asked: the name that the user gave.
        kernel: the name of the kernel that is used.
        backends: PyTorch's backends in the order in which they are tried; empty: PyTorch chooses.
        function: the function that computes attention; None: the network's own two, for sampling and for training.
    """

    asked: str
    kernel: str
    backends: tuple[SDPBackend, ...] = ()
    function: AttentionKernel | None = None

    def __str__(self) -> str:
        return self.kernel if self.kernel == self.asked else f"{self.kernel} ({self.asked})"

    def __call__(self, run: RunLayer, hidden: Tensor, context: LayerContext) -> Tensor:
        """Return the tokens after a layer that uses the chosen kernel; see `LayerRunner`."""
        with self.applied():
            return run(hidden)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let PyTorch compute attention with the chosen kernel within the block."""
        if not self.backends:
            yield
            return
        with sdpa_kernel(list(self.backends), set_priority=True):
            yield


def choose_attention(
    asked: str, device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool
) -> AttentionChoice:
    """Return the kernel for `asked` on a device, after testing it on a small example there.

    Args:
        asked: `auto`, `flash3` or one of `BACKENDS`.
        dtype: dtype of the network.
        head_dim: channels per head.
        gradients: whether the network is trained.

    Raises:
        UserError: the kernel is not available, or does not support such tensors.
    """
    if asked == AUTO:
        return _first(device, dtype, head_dim, gradients)
    if asked == FLASH3:
        return _flash3(device, dtype, head_dim, gradients)
    backend = BACKENDS[asked]
    if reason := failure(backend, device, dtype, head_dim, gradients):
        working = [name for name, each in BACKENDS.items() if not failure(each, device, dtype, head_dim, gradients)]
        raise UserError(
            f"attention: {asked} does not compute {_described(dtype, head_dim, gradients)} on {_named(device)} "
            f"({reason}); choose auto, or {' or '.join(working)}"
        )
    return AttentionChoice(asked, asked, (backend,), KERNELS["softmax"])


def _first(device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool) -> AttentionChoice:
    """Return the first kernel in the device's order that supports such tensors."""
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        order: tuple[str, ...] = next(names for least, names in PRIORITY.items() if major >= least)
    else:
        order = CPU_PRIORITY
    names = [name for name in order if not failure(BACKENDS[name], device, dtype, head_dim, gradients)]
    kernel = names[0] if names else "math"
    return AttentionChoice(AUTO, kernel, tuple(BACKENDS[name] for name in order) if device.type == "cuda" else ())


def _flash3(device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool) -> AttentionChoice:
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        raise UserError(f"attention: flash3 needs a Hopper GPU (H100, H200), not {_named(device)}; choose auto")
    if not flash_attention3.is_installed(gradients):
        has_forward = flash_attention3.is_installed(gradients=False)
        what = "fa3-fwd computes no gradients, which training needs" if has_forward else "the package is not installed"
        raise UserError(f"attention: flash3: {what}; install {flash_attention3.PACKAGES}, or choose auto")
    backends: tuple[SDPBackend, ...] = ()
    function = flash_attention3.FLASH3
    try:
        if flash_attention3.installed(flash_attention3.WHOLE):
            flash_attention3.activate()
            backends, function = (SDPBackend.FLASH_ATTENTION,), KERNELS["softmax"]
        choice = AttentionChoice(FLASH3, FLASH3, backends, function)
        with choice.applied():
            q = _example(device, dtype, head_dim, gradients)
            function(q, q, q)
    except (RuntimeError, ImportError, AttributeError) as error:
        raise UserError(
            f"attention: flash3 does not compute {_described(dtype, head_dim, gradients)} here ({_one_line(error)}); "
            "choose auto"
        ) from error
    return choice


def failure(
    backend: SDPBackend, device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool
) -> str | None:
    """Return why a kernel of PyTorch fails on a small example, or None if it succeeds."""
    q = _example(device, dtype, head_dim, gradients)
    try:
        with warnings.catch_warnings(), sdpa_kernel(backend), torch.set_grad_enabled(gradients):
            warnings.simplefilter("ignore")  # PyTorch warns once for each kernel that is disabled
            out = F.scaled_dot_product_attention(q, q, q)
            if gradients:
                out.sum().backward()
    except RuntimeError as error:
        return _one_line(error)
    return None


def _example(device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool) -> Tensor:
    shape = (1, TRIED_HEADS, TRIED_TOKENS, head_dim)
    return torch.zeros(shape, device=device, dtype=dtype, requires_grad=gradients)


def _described(dtype: torch.dtype, head_dim: int, gradients: bool) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{name} with {head_dim} channels per head{' and gradients' if gradients else ''}"


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".")
