"""Make a training run deterministic, so that a GPU repeats its numbers to the bit.

Without this a GPU may sum in a different order each time: the fastest kernels of cuDNN and cuBLAS do, and so do the
backward passes of attention and indexing. PyTorch is imported only when it is needed.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cogvideox_sat.configuration.yaml_reading import read_yaml
from sgm.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS reads it when a process first multiplies matrices on a GPU
WORKSPACES = (":4096:8", ":16:8")  # with these, cuBLAS sums in a fixed order
REFUSAL = "does not have a deterministic implementation"  # part of PyTorch's message


def check_workspace(deterministic: bool) -> None:
    """Check that the environment allows a deterministic run, if one is asked for.

    Raises:
        UserError: the environment gives cuBLAS a workspace with which the order of its sums may change.
    """
    given = os.environ.get(WORKSPACE)
    if deterministic and given is not None and given not in WORKSPACES:
        raise UserError(
            f"deterministic: the environment has {WORKSPACE}={given}, with which cuBLAS may sum in a different order "
            f"each time; unset it, or set it to {WORKSPACES[0]}"
        )


def describe_change(run_folder: Path, deterministic: bool) -> str | None:
    """Return a warning if a run is resumed with another value of `deterministic`, else None."""
    try:
        config = read_yaml(run_folder / "training_config.yaml")
        recorded = config["args"].get("deterministic")
    except (UserError, LookupError, TypeError, AttributeError):
        return None  # the file may be missing from a run of another program
    recorded = recorded is True
    if recorded == deterministic:
        return None
    names = {True: "--deterministic", False: "--no-deterministic"}
    return (
        f"deterministic: {run_folder} was trained with {names[recorded]} and is resumed with {names[deterministic]}; "
        f"on a GPU its losses will differ from those of an uninterrupted run; give {names[recorded]} for equal ones"
    )


def recorded(config: Mapping[str, Any], deterministic: bool) -> dict[str, Any]:
    """Return the configuration to save beside a run, with the value of `deterministic` in it."""
    return {**config, "args": {**(config.get("args") or {}), "deterministic": deterministic}}


@contextmanager
def deterministic_arithmetic(enabled: bool) -> Iterator[None]:
    """Let PyTorch compute in a fixed order within the block; if not `enabled`, change nothing.

    Raises:
        UserError: the block uses an operation that has no deterministic form on its device.
    """
    if not enabled:
        yield
        return
    import torch

    cudnn = torch.backends.cudnn
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings, workspace = (cudnn.deterministic, cudnn.benchmark), os.environ.get(WORKSPACE)
    os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if REFUSAL not in str(error):
            raise
        operation = str(error).partition(REFUSAL)[0].strip()
        raise UserError(
            f"deterministic: the operation {operation} has no deterministic form on this device; train without "
            "--deterministic"
        ) from error
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        cudnn.deterministic, cudnn.benchmark = settings
        if workspace is None:
            os.environ.pop(WORKSPACE, None)
