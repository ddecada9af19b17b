"""Objects arrive as they were sent, tensors of any kind in shared memory, or not at all."""

import contextlib
import os
import resource
from pathlib import Path

import pytest
import torch

from cogvideox_sat.parallel.process_transfer import receive, send, socket_pair
from sgm.forking import garbage_left_alone


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_nested_tensors_arrive(dtype):
    ours, theirs = socket_pair()
    x = (torch.arange(24) % 2).to(dtype).view(2, 3, 4)
    content = {"x": x.transpose(0, 2), "list": [x[0], "text", None], "empty": x[:0], "scalar": x[0, 0, 1], "n": 3}
    send(ours, content)
    arrived = receive(theirs)
    assert torch.equal(arrived["x"], x.transpose(0, 2)) and arrived["x"].is_contiguous()
    assert torch.equal(arrived["list"][0], x[0]) and arrived["list"][1:] == ["text", None]
    assert arrived["empty"].shape == (0, 3, 4) and arrived["empty"].dtype == dtype
    assert arrived["scalar"] == x[0, 0, 1] and arrived["n"] == 3
    arrived["x"].zero_()
    assert x.any()


def test_large_messages_without_tensors_arrive_and_files_are_closed():
    ours, theirs = socket_pair()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for size in (10, 40_000, 5_000_000):
        send(ours, "x" * size)
        assert receive(theirs) == "x" * size
    assert len(list(Path("/proc/self/fd").iterdir())) <= before  # garbage of other tests may have closed some


def test_what_was_sent_before_the_end_arrives():
    ours, theirs = socket_pair()
    send(ours, [1, torch.ones(3)])
    ours.close()
    assert receive(theirs)[0] == 1
    with pytest.raises(EOFError):
        receive(theirs)
    with pytest.raises(OSError, match=r"\w"):
        send(theirs, "lost")


def test_tensors_outlive_the_process_that_sent_them():
    ours, theirs = socket_pair()
    with garbage_left_alone():
        pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # the threads of this process's pool are not there, but OpenMP would wait for them
        send(ours, torch.full((1000, 1000), 7.0))
        os._exit(0)
    os.waitpid(pid, 0)
    assert receive(theirs).sum() == 7e6


def test_tensors_for_which_no_file_can_be_opened_are_not_taken_for_the_end():
    ours, theirs = socket_pair()
    send(ours, torch.ones(3))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened[0] + 1, hard))
    try:
        with contextlib.suppress(OSError):  # until no number below the limit is free
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(OSError, match="Too many open files"):
            receive(theirs)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in opened:
            os.close(descriptor)
