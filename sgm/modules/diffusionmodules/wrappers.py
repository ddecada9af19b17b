"""What stands between a denoiser and a network."""

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
    """Raise a UserError if torch.compile cannot work on `device` for want of a C++ compiler."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and not shutil.which(compiler.split()[0]):  # flags may follow
        raise UserError(
            f"{NEEDED}a C++ compiler on a CPU, and {compiler} does not exist; "
            "install one, name another in the environment variable CXX, or set compile_model: false"
        )


@cache
def why_not_compilable(device: torch.device) -> str | None:
    """Return why torch.compile does not work on a device; None: it works.

    On a CPU it needs a C++ compiler. On a GPU it needs Triton, a C compiler and Python's headers, which not every
    machine has: there it is tried on a few numbers.
    """
    try:
        check_compiler(device)
        if device.type == "cpu":
            return None
        torch.compile(lambda x: x * 2 + 1, fullgraph=True)(torch.ones(8, device=device))
    except UserError as error:
        return f"it needs {str(error).removeprefix(NEEDED)}"
    except Exception as error:  # of any kind, from whichever of these is missing
        return compiler_reason(error)
    return None


@cache
def compiler_errors() -> tuple[type[Exception], ...]:
    """Return what a compiler that fails raises: its own errors, and those of files and programs that it cannot use."""
    from torch._dynamo.exc import TorchDynamoException  # takes a while to import

    return TorchDynamoException, OSError, ImportError, subprocess.SubprocessError


def compiler_reason(error: Exception) -> str:
    """Return what went wrong with a compiler, as a part of one line."""
    described = " ".join(str(error).split())
    for advice in (" Set TORCHDYNAMO_VERBOSE", " The above exception was", " from user code:"):
        described = described.partition(advice)[0]  # to who works on the compiler
    return described[:200] or type(error).__name__


def go_on_without_compiler(network: nn.Module, error: Exception) -> None:
    """Say in one line that a compiler failed, and tell who asked for it, by the network's `compiler_failed`, if any."""
    logger.warning("compile_model: the network goes on without torch.compile, which failed: %s", compiler_reason(error))
    if failed := getattr(network, "compiler_failed", None):
        failed()


def compile_network(network: nn.Module) -> None:
    """Run a network through torch.compile: layer by layer if it knows how to, else as a whole."""
    compile_layers = getattr(network, "compile_layers", None)
    if compile_layers is None or not compile_layers():
        network.compile()


OPENAIUNETWRAPPER = "sgm.modules.diffusionmodules.wrappers.OpenAIWrapper"
"""The class that `network_wrapper` in a configuration stands for by default."""


class OpenAIWrapper(nn.Module):
    """Calls a network with the conditioning laid out as its arguments.

    Args:
        diffusion_model: the network; the name of the attribute is part of every checkpoint key.
        compile_model: run the network through torch.compile, see `compile_network`. State-dict names stay as they are.
        dtype: what the network computes in; None: that of its parameters at the time of the call.

    Raises:
        UserError: it is to be compiled for a CPU, and there is no C++ compiler.
    """

    def __init__(self, diffusion_model: nn.Module, compile_model: bool = False, dtype: torch.dtype | None = None):
        super().__init__()
        self.diffusion_model = diffusion_model
        self.dtype = dtype
        if compile_model:
            check_compiler(next(self.parameters(), torch.empty(0)).device)
            compile_network(self.diffusion_model)

    def forward(self, x: Tensor, t: Tensor, c: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """Run the network.

        Args:
            x: latents (batch, time, channel, height, width), or images (batch, channel, height, width).
            t: (batch,) timesteps or noise levels; kept as they are.
            c: "crossattn" (batch, tokens, features) becomes `context`, "vector" (batch, features) becomes `y`, and
                "concat", shaped like `x` but for the channels, is appended to the channels of `x`.
            kwargs: passed on (`idx`, `ofs`, `scale_emb`, ...).

        Returns:
            float32, shaped like `x` in all but the channels, which are the network's.
        """
        dtype = self.dtype or next(self.diffusion_model.parameters()).dtype
        if "concat" in c:
            x = torch.cat([x.to(dtype), c["concat"].to(dtype)], dim=x.ndim - 3)
        context, vector = (c[kind].to(dtype) if kind in c else None for kind in ("crossattn", "vector"))
        return self._run(x.to(dtype), timesteps=t, context=context, y=vector, **kwargs).float()

    def _run(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the network; where it is compiled as a whole and the compiler fails, from then on without."""
        network = self.diffusion_model
        if network._compiled_call_impl is None:
            return network(*args, **kwargs)
        try:
            return network(*args, **kwargs)
        except compiler_errors() as error:
            network._compiled_call_impl = None
            go_on_without_compiler(network, error)
            return network(*args, **kwargs)
