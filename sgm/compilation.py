"""torch.compile: whether it works on a device, and what to do when it fails."""

import logging
import os
import shutil
import subprocess
import sys
from functools import cache

import torch
from torch import nn

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
