"""A forked process leaves the garbage of its parent alone."""

import gc
import os

import pytest

from sgm.forking import garbage_left_alone


class Noticed:
    """Writes to a pipe when it is freed."""

    def __init__(self, pipe: int):
        self.pipe, self.itself = pipe, self  # a cycle, which only a collection frees

    def __del__(self):
        os.write(self.pipe, b"freed")


@pytest.mark.parametrize("enabled", [True, False])
def test_a_child_never_frees_what_its_parent_left(enabled):
    read, write = os.pipe()
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        Noticed(write)
        with garbage_left_alone():
            process = os.fork()
        if process == 0:
            gc.collect()
            os._exit(3 if gc.isenabled() == enabled else 4)
        assert gc.isenabled() == enabled
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 3
        os.set_blocking(read, False)
        with pytest.raises(BlockingIOError):
            os.read(read, 5)
        gc.collect()
        assert os.read(read, 5) == b"freed", "the parent frees it"
    finally:
        (gc.enable if was else gc.disable)()
        os.close(read)
        os.close(write)
