"""Decide whether the GPU kernels serve, without importing Triton on a CPU.

If Triton is missing or fails, the callers compute the same in several passes.
"""

import functools
import importlib.util
import logging
from types import ModuleType

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 2048  # channels

logger = logging.getLogger(__name__)


def kernels_for(*tensors: Tensor) -> ModuleType | None:
    """Return `gpu_kernels` if they support these tensors, or None.

    The tensors must be on a GPU, with rows of channels one after the other.
    """
    first = tensors[0]
    if (
        first.device.type != "cuda"
        or first.dtype not in DTYPES
        or first.shape[1] > WIDEST
        or not all(x.dtype == first.dtype and x.numel() > 0 and _is_dense(x) for x in tensors)
        or not work_in(first.dtype)
    ):
        return None
    from vae_modules.passes import gpu_kernels

    return gpu_kernels


@functools.cache
def work_in(dtype: torch.dtype) -> bool:
    """Return whether the kernels give the results of PyTorch on this machine.

    The kernels are tried once in each dtype, and a failure is logged.
    """
    if importlib.util.find_spec("triton") is None:  # on Windows
        return False
    from vae_modules.passes import gpu_trial

    try:
        gpu_trial.try_out(dtype)
    except torch.OutOfMemoryError:  # says nothing about the kernels; the caller continues with fewer frames
        raise
    except Exception as error:  # Triton, its compiler or the driver raises many kinds
        reason = str(error).strip().partition("\n")[0]
        logger.warning("the VAE runs without its own GPU kernels, which fail on this machine: %s", reason)
        return False
    return True


def _is_dense(x: Tensor) -> bool:
    """Return whether the places of each clip are rows of channels without gaps."""
    return x.ndim == 5 and x[:1].is_contiguous(memory_format=torch.channels_last_3d)
