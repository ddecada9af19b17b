"""Recorded reference numbers, and the comparison of every parity test."""

import ctypes
import gc
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sgm.compilation import check_compiler
from sgm.errors import UserError

FP16_PROCESSOR = torch.ops.mkldnn._is_mkldnn_fp16_supported()  # DeepSpeed's check on a CPU
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
    """Return the norm of the difference over that of the expected tensor, in float64."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Check that `actual` is finite and within the relative error `tolerance` of `expected`."""
    assert torch.isfinite(actual).all()
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.3g} is over {tolerance:g}"


def anonymous_growth(action: Callable[[], object]) -> int:
    """Return the largest growth in bytes of this process's anonymous memory during an action.

    Mapped parts of files are not counted. Linux only.
    """

    def now() -> int:
        return 1024 * int(re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])

    def watch() -> None:
        while not done.wait(0.001):
            peak.append(now())

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise the action would reuse freed memory
    done, peak = threading.Event(), [now()]
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        action()
        peak.append(now())
    finally:
        done.set()
        watcher.join()
    return max(peak) - peak[0]
