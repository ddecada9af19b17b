"""The device that the meta device stands for, while memory is estimated."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_device_type = ContextVar("_device_type", default="cuda")


def type_of(x: Any) -> str:
    """Return the device type of `x`, such as "cuda", or the one that meta stands for."""
    return _device_type.get() if x.device.type == "meta" else x.device.type


@contextmanager
def standing_for(device_type: str) -> Iterator[None]:
    """Let the meta device stand for a device of another type within the block."""
    token = _device_type.set(device_type)
    try:
        yield
    finally:
        _device_type.reset(token)
