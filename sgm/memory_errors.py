"""Turn full memory, of a GPU or of the host, into one line for the user.

PyTorch is not imported.
"""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sgm.errors import UserError

GENERAL_ADVICE = "use a smaller batch, fewer frames or a smaller size"

# Messages of libraries whose exception types also stand for other errors.
ON_DEVICE = re.compile(r"CUDA out of memory|CUDA error: out of memory|HIP out of memory|\w+_STATUS_ALLOC_FAILED")
IN_HOST_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory|std::bad_alloc|cudaHostAlloc|"
    r"Unable to allocate .* for an array|unable to allocate shared memory|unable to mmap \d+ bytes"
)
ASKED_FOR = re.compile(r"ried to allocate ([\d.]+) ?(bytes|[KMGTPE]i?B)|nable to allocate ([\d.]+) ([KMGTPE]?i?B)")


class OutOfMemory(UserError):
    """The memory of the device or of the host is full.

    Args:
        where: what was being done, such as "encoding clips".
        shortage: which memory is full; see `describe_shortage`.
        advice: what to do; None: an outer `memory_guard` adds it.
    """

    def __init__(self, where: str, shortage: str, advice: str | None = None):
        self.where, self.shortage, self.advice = where, shortage, advice
        super().__init__(f"{where}: {shortage}; {advice or GENERAL_ADVICE}")

    def __reduce__(self) -> tuple[type["OutOfMemory"], tuple[str, str, str | None]]:
        return type(self), (self.where, self.shortage, self.advice)  # for sending to other processes


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` reports full memory.

    The forms of PyTorch, Python, NumPy and the operating system are recognized.
    """
    return isinstance(error, OutOfMemory | MemoryError) or _is_device_error(error) or _is_host_error(error)


def memory_cause(error: BaseException | None) -> BaseException | None:
    """Return the first of `error` and its causes that reports full memory; None without one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if is_out_of_memory(error):
            return error
        seen.add(id(error))
        error = error.__cause__
    return None


def describe_shortage(error: BaseException) -> str:
    """Return which memory is full, and the size of the failed allocation if `error` has it."""
    kind = "the memory of the GPU is full" if _is_device_error(error) else "host memory is full"
    match = ASKED_FOR.search(str(error))
    if not match:
        return kind
    number, unit = match.group(1) or match.group(3), match.group(2) or match.group(4)
    if unit == "bytes":
        number, unit = f"{float(number) / 2**30:.2f}", "GiB"
    return f"{kind} ({number} {unit} more were asked for)"


@contextmanager
def memory_guard(where: str, advice: Callable[[str], str] | str | None = None) -> Iterator[None]:
    """Turn an exception of the block that reports full memory into an `OutOfMemory`.

    Guards can be nested: the innermost one gives the place, the innermost one with advice gives the advice.

    Args:
        where: what the block does.
        advice: what to do, or a function of the innermost `where` that returns it; None: leave it to an outer guard.

    Raises:
        OutOfMemory: memory is full.
    """
    try:
        yield
    except Exception as error:
        cause = memory_cause(error)
        if cause is None:
            raise
        known = cause if isinstance(cause, OutOfMemory) else OutOfMemory(where, describe_shortage(cause))
        if known.advice is None and advice is not None:
            known = OutOfMemory(known.where, known.shortage, advice if isinstance(advice, str) else advice(known.where))
        try:
            if known is error:
                raise
            raise known from error
        finally:  # errors refer to this frame: without these names no reference cycle keeps their frames' tensors
            del cause, known


def _is_device_error(error: BaseException) -> bool:
    if any(kind.__name__ == "OutOfMemoryError" and kind.__module__.startswith("torch") for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and bool(ON_DEVICE.search(str(error)))


def _is_host_error(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    # safetensors reports errors of the operating system by its own exception.
    may_tell = isinstance(error, RuntimeError | OSError) or type(error).__name__ == "SafetensorError"
    return may_tell and bool(IN_HOST_MEMORY.search(str(error)))
