"""The wrapper of a network for a denoiser, and torch.compile."""

import logging
import os
import shutil
import subprocess
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sgm.errors import UserError

logger = logging.getLogger(__name__)

NEEDED = "compile_model: true needs "


def check_compiler(device: torch.device) -> None:
    """Check that torch.compile has a C++ compiler if `device` is a CPU.

    Raises:
        UserError: the compiler does not exist.
    """
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and not shutil.which(compiler.split()[0]):  # flags may follow
        raise UserError(
            f"{NEEDED}a C++ compiler on a CPU, and {compiler} does not exist; "
            "install one, name another in the environment variable CXX, or set compile_model: false"
        )


@cache
def why_not_compilable(device: torch.device) -> str | None:
    """Return the reason why torch.compile does not work on a device; None: it works.

    On a CPU it needs a C++ compiler. On a GPU it needs Triton, a C compiler and Python's headers, which some machines
    lack: there a small function is compiled.
    """
    try:
        check_compiler(device)
        if device.type == "cpu":
            return None
        torch.compile(lambda x: x * 2 + 1, fullgraph=True)(torch.ones(8, device=device))
    except UserError as error:
        return f"it needs {str(error).removeprefix(NEEDED)}"
    except Exception as error:  # the kind depends on the missing part
        return compiler_reason(error)
    return None


@cache
def compiler_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of a compiler that fails.

    The exceptions are the compiler's own, and those of files and programs that the compiler cannot use.
    """
    from torch._dynamo.exc import TorchDynamoException  # takes a while to import

    return TorchDynamoException, OSError, ImportError, subprocess.SubprocessError


def compiler_reason(error: Exception) -> str:
    """Return the reason of a compiler's failure, as a part of one line."""
    described = " ".join(str(error).split())
    for advice in (" Set TORCHDYNAMO_VERBOSE", " The above exception was", " from user code:"):
        described = described.partition(advice)[0]  # advice for developers of the compiler
    return described[:200] or type(error).__name__


def go_on_without_compiler(network: nn.Module, error: Exception) -> None:
    """Log that a compiler failed, and call the network's `compiler_failed`, if it has one."""
    logger.warning("compile_model: the network goes on without torch.compile, which failed: %s", compiler_reason(error))
    if failed := getattr(network, "compiler_failed", None):
        failed()


def compile_network(network: nn.Module) -> None:
    """Run a network through torch.compile, layer by layer if the network supports that."""
    compile_layers = getattr(network, "compile_layers", None)
    if compile_layers is None or not compile_layers():
        network.compile()


OPENAIUNETWRAPPER = "sgm.modules.diffusionmodules.wrappers.OpenAIWrapper"
"""The default of `network_wrapper` in a configuration."""


class OpenAIWrapper(nn.Module):
    """Calls a network with the conditioning as its arguments.

    Args:
        diffusion_model: the network; the name of the attribute is part of every checkpoint key.
        compile_model: run the network through torch.compile, see `compile_network`. State-dict names stay the same.
        dtype: dtype of the network's computation; None: that of its parameters at the time of the call.

    Raises:
        UserError: the network is to be compiled for a CPU, and a C++ compiler does not exist.
    """

    def __init__(self, diffusion_model: nn.Module, compile_model: bool = False, dtype: torch.dtype | None = None):
        super().__init__()
        self.diffusion_model = diffusion_model
        self.dtype = dtype
        if compile_model:
            check_compiler(next(self.parameters(), torch.empty(0)).device)
            compile_network(self.diffusion_model)

    def forward(self, x: Tensor, t: Tensor, c: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """Return the network's output: float32, shaped like `x` except for the channels.

        Args:
            x: latents (batch, time, channel, height, width), or images (batch, channel, height, width).
            t: (batch,) timesteps or noise levels, in any dtype.
            c: "crossattn" (batch, tokens, features) becomes `context`, "vector" (batch, features) becomes `y`, and
                "concat", shaped like `x` except for the channels, is appended to the channels of `x`.
            kwargs: passed to the network (`idx`, `ofs`, `scale_emb`, ...).
        """
        dtype = self.dtype or next(self.diffusion_model.parameters()).dtype
        if "concat" in c:
            x = torch.cat([x.to(dtype), c["concat"].to(dtype)], dim=x.ndim - 3)
        context, vector = (c[kind].to(dtype) if kind in c else None for kind in ("crossattn", "vector"))
        return self._run(x.to(dtype), timesteps=t, context=context, y=vector, **kwargs).float()

    def _run(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the network; if it is compiled as a whole and that fails, call it uncompiled.

        Later calls then run without the compiler too.
        """
        network = self.diffusion_model
        if network._compiled_call_impl is None:
            return network(*args, **kwargs)
        try:
            return network(*args, **kwargs)
        except compiler_errors() as error:
            network._compiled_call_impl = None
            go_on_without_compiler(network, error)
            return network(*args, **kwargs)
