"""The device that the meta device stands for, while memory is estimated."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_device_type = ContextVar("_device_type", default="cuda")


def stands_for() -> str:
    """Return the type of the device, such as "cuda"."""
    return _device_type.get()


@contextmanager
def standing_for(device_type: str) -> Iterator[None]:
    """Let the meta device stand for a device of another type within the block."""
    token = _device_type.set(device_type)
    try:
        yield
    finally:
        _device_type.reset(token)
