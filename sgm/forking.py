"""Fork a process that has threads."""

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_left_alone() -> Iterator[None]:
    """Let a block fork such that the child never frees garbage of the parent.

    The destructor of a process group of gloo waits for its threads, which a child does not have. Python's warning about
    threads is ignored: their locks are of no use to a child that only reads a file.
    """
    parent, enabled = os.getpid(), gc.isenabled()
    gc.disable()  # handlers that run on a fork could start a collection
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if os.getpid() != parent:
            gc.freeze()
        if enabled:
            gc.enable()
