"""Choose the kernel that computes the attention of a network, by name or by the device, and try it before any weights
are read.

What PyTorch chooses by itself changes with its version, and with it speed and last digits. On a GPU the order of
`PRIORITY` decides instead. On a CPU, PyTorch's own choice stays.
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
# By the first number of the compute capability, from which on the order holds. cuDNN's kernel is the fastest of
# PyTorch's on Hopper at 64 channels a head: 413 TFLOP/s beside FlashAttention 2's 324 (published for the H100).
PRIORITY: dict[int, tuple[str, ...]] = {
    9: ("cudnn", "flash", "efficient", "math"),
    0: ("flash", "cudnn", "efficient", "math"),
}
CPU_PRIORITY = ("flash", "math")
TRIED_TOKENS, TRIED_HEADS = 128, 2


@dataclass(frozen=True)
class AttentionChoice:
    """The kernel of a network on a device.

    Attributes:
        asked: the name that the user gave.
        kernel: the name of the one that computes.
        backends: of PyTorch, in the order in which they are tried; empty: PyTorch chooses.
        function: computes attention; None: the network's own two, for sampling and for training.
    """

    asked: str
    kernel: str
    backends: tuple[SDPBackend, ...] = ()
    function: AttentionKernel | None = None

    def __str__(self) -> str:
        return self.kernel if self.kernel == self.asked else f"{self.kernel} ({self.asked})"

    def __call__(self, run: RunLayer, hidden: Tensor, context: LayerContext) -> Tensor:
        """Return the tokens as they are after a layer that computes attention by the kernel; see `LayerRunner`."""
        with self.applied():
            return run(hidden)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let PyTorch's attention be computed by the kernel within the block."""
        if not self.backends:
            yield
            return
        with sdpa_kernel(list(self.backends), set_priority=True):
            yield


def choose_attention(
    asked: str, device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool
) -> AttentionChoice:
    """Return the kernel that `asked` means on a device, once it has computed a small example there.

    Args:
        asked: `auto`, `flash3` or one of `BACKENDS`.
        dtype: of the network.
        head_dim: channels of a head.
        gradients: the network is trained.

    Raises:
        UserError: the kernel is not there, or does not take such tensors.
    """
    if asked == AUTO:
        return _first(device, dtype, head_dim, gradients)
    if asked == FLASH3:
        return _flash3(device, dtype, head_dim, gradients)
    backend = BACKENDS[asked]
    if reason := refusal(backend, device, dtype, head_dim, gradients):
        working = [name for name, each in BACKENDS.items() if not refusal(each, device, dtype, head_dim, gradients)]
        raise UserError(
            f"attention: {asked} does not compute {_described(dtype, head_dim, gradients)} on {_named(device)} "
            f"({reason}); choose auto, or {' or '.join(working)}"
        )
    return AttentionChoice(asked, asked, (backend,), KERNELS["softmax"])


def _first(device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool) -> AttentionChoice:
    """Return the first kernel of the device's order that computes such tensors."""
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        order: tuple[str, ...] = next(names for least, names in PRIORITY.items() if major >= least)
    else:
        order = CPU_PRIORITY
    names = [name for name in order if not refusal(BACKENDS[name], device, dtype, head_dim, gradients)]
    kernel = names[0] if names else "math"
    return AttentionChoice(AUTO, kernel, tuple(BACKENDS[name] for name in order) if device.type == "cuda" else ())


def _flash3(device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool) -> AttentionChoice:
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        raise UserError(f"attention: flash3 needs a Hopper GPU (H100, H200), not {_named(device)}; choose auto")
    if not flash_attention3.is_installed(gradients):
        has_forward = flash_attention3.is_installed(gradients=False)
        what = "fa3-fwd has no gradients, and this is training" if has_forward else "it is not installed"
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


def refusal(
    backend: SDPBackend, device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool
) -> str | None:
    """Return why a kernel of PyTorch does not compute a small example; None: it does."""
    q = _example(device, dtype, head_dim, gradients)
    try:
        with warnings.catch_warnings(), sdpa_kernel(backend), torch.set_grad_enabled(gradients):
            warnings.simplefilter("ignore")  # which say why not, in a line for each kernel that is off
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
    return f"{name} of {head_dim} channels a head{' with gradients' if gradients else ''}"


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".")
