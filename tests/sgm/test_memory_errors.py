"""Full memory is recognized in every library's form, and becomes one line."""

import errno
import logging
import mmap

import numpy as np
import pytest
import torch

from sgm.errors import UserError
from sgm.exit_codes import exit_code
from sgm.memory_errors import OutOfMemory, describe_shortage, is_out_of_memory, memory_guard

HUGE = 2**50  # elements, more than any address space here gives


def too_large_for_pytorch() -> None:
    torch.empty(HUGE)


def too_large_for_numpy() -> None:
    np.empty(HUGE)


def too_large_for_python() -> None:
    bytearray(2**60)


def too_large_to_map() -> None:
    mmap.mmap(-1, 2**60)


REAL = [too_large_for_pytorch, too_large_for_numpy, too_large_for_python, too_large_to_map]
ON_DEVICE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 79.1 GiB"),
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]
OTHERS = [
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    ValueError("CUDA out of memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    KeyError("DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("fail", REAL, ids=lambda fail: fail.__name__)
def test_what_really_happens_is_recognised(fail):
    with (
        pytest.raises(OutOfMemory, match=r"^encoding: host memory is full.*; use tiles$"),
        memory_guard("encoding", "use tiles"),
    ):
        fail()


@pytest.mark.parametrize("error", ON_DEVICE, ids=str)
def test_what_a_gpu_says_is_recognised(error):
    assert is_out_of_memory(error) and describe_shortage(error).startswith("the memory of the GPU is full")


def test_the_line_says_how_much_was_asked_for():
    assert describe_shortage(ON_DEVICE[0]) == "the memory of the GPU is full (20.50 GiB more were asked for)"
    with pytest.raises(RuntimeError) as caught:
        torch.empty(HUGE)
    assert describe_shortage(caught.value) == f"host memory is full ({4 * HUGE / 2**30:.2f} GiB more were asked for)"


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_pass_through(error):
    with pytest.raises(type(error)) as caught, memory_guard("encoding"):
        raise error
    assert caught.value is error


def test_the_inner_guard_says_where_and_the_first_with_an_advice_what_to_do():
    with (
        pytest.raises(OutOfMemory, match=r"^encoding clips: host memory is full; for encoding clips: tiles$"),
        memory_guard("training", "a smaller world"),
        memory_guard("step", lambda where: f"for {where}: tiles"),
        memory_guard("encoding clips"),
    ):
        raise MemoryError


def test_an_error_that_a_library_call_was_reported_as_is_looked_through():
    """Loaders of text encoders and weights report whatever comes up as a mistake of their own."""
    with (
        pytest.raises(OutOfMemory, match=r"^loading the text encoder: host memory is full"),
        memory_guard("loading the text encoder"),
    ):
        try:
            torch.empty(HUGE)
        except RuntimeError as error:
            raise UserError("cannot load the T5 encoder") from error


@pytest.mark.parametrize("error", [MemoryError(), ON_DEVICE[0]], ids=["host", "GPU"])
def test_a_command_that_guards_nothing_ends_with_one_line_and_2(caplog, error):
    def command() -> int:
        raise error

    assert exit_code(command, logging.getLogger("x")) == 2
    (line,) = caplog.messages
    assert line.startswith("error: out of memory: ") and "\n" not in line and caplog.records[0].exc_info is None


def test_a_bug_is_no_shortage():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0, logging.getLogger("x"))
