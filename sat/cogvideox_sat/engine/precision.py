"""The dtype in which an engine computes, and what to do when its range is too small."""

import torch
from torch import Tensor

from cogvideox_sat.configuration.settings import EngineSettings
from sgm.errors import UserError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def dtype_of(settings: EngineSettings) -> torch.dtype:
    """Return float16 for `fp16`, bfloat16 for `bf16`, else float32.

    Raises:
        UserError: both are set.
    """
    chosen = [name for name in DTYPES if getattr(settings, name)]
    if len(chosen) > 1:
        raise UserError("fp16 and bf16 are both on: choose one")
    return DTYPES[chosen[0]] if chosen else torch.float32


def check_finite_output(output: Tensor, dtype: torch.dtype) -> None:
    """Check that all values of a network's output are finite, else raise UserError.

    Args:
        output: values of any shape.
        dtype: dtype in which the network computed them, which decides on the advice.
    """
    if not torch.isfinite(output).all():
        raise UserError(f"the network's output is not finite: {other_precision(dtype)}")


def other_precision(dtype: torch.dtype) -> str:
    """Return advice for values that are not finite in `dtype`."""
    if dtype == torch.float16:
        return "fp16 is too narrow for this model, use bf16 (--bf16)"
    files = "check the weights and the adapter: they may be damaged, another model's, or converted to fp16 (use bf16)"
    return f"use float32 (--no-bf16), or {files}" if dtype == torch.bfloat16 else files
