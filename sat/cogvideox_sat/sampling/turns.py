"""Turn a function that reports by a callback into an iterator.

The caller of the iterator decides when the function continues.
"""

import ctypes
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, suppress
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

GO, STOP = True, False

Report = TypeVar("Report")


class StoppedWork(BaseException):
    """Signal that the caller wants no more of the work.

    It is not an `Exception`, so that handlers within the work do not catch it.
    """


class RandomNumbers:
    """Random state of some work, kept apart from the rest of the program.

    It is PyTorch's global state only within `with` blocks; each block continues where the one before ended.

    Args:
        device: device whose random state is kept too, besides that of the CPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.own: list[torch.Tensor] | None = None

    def __enter__(self) -> None:
        self.others = self._state()
        if self.own is not None:
            self._restore(self.own)

    def __exit__(self, *_: Any) -> None:
        self.own = self._state()
        self._restore(self.others)

    def _state(self) -> list[torch.Tensor]:
        on_gpu = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *on_gpu]

    def _restore(self, state: list[torch.Tensor]) -> None:
        torch.set_rng_state(state[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state[1], self.device)


def in_turns(
    work: Callable[[Callable[[Report], None]], None], inside: AbstractContextManager[Any]
) -> Generator[Report, None, None]:
    """Yield each `x` of the calls `report(x)` that `work(report)` makes.

    The work waits until the next value is requested. It runs in its own thread, because a user's sampler cannot be
    suspended otherwise. The two threads never compute at the same time. When the generator is closed, the call of
    `report` in which the work waits raises `StoppedWork`; when the caller is interrupted while the work runs, the work
    is interrupted too.

    Args:
        work: the function; its exceptions are raised in the caller.
        inside: context manager, entered whenever the work continues and left whenever it waits.
    """
    to_work: SimpleQueue[bool] = SimpleQueue()
    to_caller: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    threads = torch.get_num_threads()

    def report(value: Report) -> None:
        to_caller.put(("report", value))
        if to_work.get() is STOP:
            raise StoppedWork

    def run() -> None:
        with suppress(StoppedWork):  # an interruption that arrives when the work has just ended
            try:
                torch.set_num_threads(threads)  # OpenMP keeps it for each thread, and the order of sums depends on it
                work(report)
                to_caller.put(("end", None))
            except BaseException as error:  # kept in no variable, which would keep its frames and their tensors alive
                to_caller.put(("error", error))

    thread = threading.Thread(target=copy_context().run, args=(run,), name="sampling", daemon=True)
    value, computes = None, False
    try:
        with inside:
            thread.start()
            computes = True
            kind, value = to_caller.get()
        while kind == "report":
            computes = False
            yield value
            with inside:
                computes = True
                to_work.put(GO)
                kind, value = to_caller.get()
        computes = False
        if kind == "error":
            raise value
    finally:
        value = None
        to_work.put(STOP)
        if computes:
            interrupt(thread)
        if thread.ident is not None:
            thread.join()


def interrupt(thread: threading.Thread) -> None:
    """Raise `StoppedWork` in a thread before its next Python instruction.

    This is what a signal does in the main thread.
    """
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(StoppedWork))
