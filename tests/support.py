"""Recorded reference numbers and the comparison that every parity test uses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sgm.errors import UserError
from sgm.modules.diffusionmodules.wrappers import check_compiler

FP16_PROCESSOR = torch.ops.mkldnn._is_mkldnn_fp16_supported()  # what DeepSpeed asks on a CPU
needs_fp16 = pytest.mark.skipif(not FP16_PROCESSOR, reason="DeepSpeed does not train in float16 on this processor")


def _has_compiler() -> bool:
    try:
        check_compiler(torch.device("cpu"))
    except UserError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="torch.compile needs a C++ compiler")
REFERENCE = Path(__file__).parent / "reference"


class Reference:
    """One file of recorded reference numbers: its `case` description and its tensors."""

    def __init__(self, name: str):
        with safe_open(REFERENCE / f"{name}.safetensors", "pt") as file:
            self.case = json.loads(file.metadata()["case"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor, in float64."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Fail unless `actual` is finite and within the relative error `tolerance` of `expected`."""
    assert torch.isfinite(actual).all()
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.3g} is over {tolerance:g}"
