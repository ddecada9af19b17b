"""Copies in host memory, from which `torch.save` writes the same files."""

import io
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from cogvideox_sat.runs import staging
from cogvideox_sat.runs.staging import StagingMemory, staged


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(staging, "SLAB_BYTES", 1000)
    made = StagingMemory(pinned=False)
    made.start_over(10_000)
    return made


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, 5, 2), (400,), (2, 3, 4, 5)])
def test_a_copy_is_of_its_moment_and_has_a_storage_of_its_own(memory, dtype, shape):
    tensor = torch.randint(0, 2, shape).to(dtype)
    layouts = [tensor, tensor.transpose(0, -1) if tensor.ndim else tensor]
    layouts += [tensor.contiguous(memory_format=torch.channels_last)] if tensor.ndim == 4 else []
    for original in layouts:
        plain = original.to("cpu", copy=True)
        copy = memory.copy(original)
        assert copy.dtype == dtype and torch.equal(copy, original) and copy.stride() == plain.stride()
        assert copy.untyped_storage().nbytes() == tensor.nbytes and copy.data_ptr() % 32 == 0
        assert saved(copy) == saved(plain)
        original.fill_(1)
        assert torch.equal(copy, plain)
        original.copy_(plain)


def test_memory_is_kept_and_used_again(memory):
    tensors = [torch.full((size,), float(size)) for size in (100, 200, 600, 3, 100)]
    copies = [memory.copy(tensor) for tensor in tensors]
    assert [slab.nbytes for slab in memory.slabs] == [1000, 1000, 2400, 1000]
    places = [copy.data_ptr() for copy in copies]
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))
    memory.start_over(10_000)
    assert [memory.copy(tensor).data_ptr() for tensor in tensors] == places
    small = StagingMemory(pinned=False)
    small.start_over(80)
    small.copy(torch.ones(5))
    assert [slab.nbytes for slab in small.slabs] == [80]


def test_nested_content_is_written_alike(memory):
    tied = torch.randn(6, 4)
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    assert hasattr(state, "_metadata")
    group = {"lr": 0.1, "betas": (0.9, 0.95), "params": [0, 1]}
    content = {
        "state_dict": state,
        "tied": [tied, tied.view(24), tied[2:], tied.t()],
        "same": (group, group),
        "ordered": OrderedDict(a=torch.zeros(0), b=torch.zeros(0)),
        "numbers": torch.get_rng_state(),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "epoch": 3,
    }
    before = saved(content)
    copy = staged(content, memory)
    assert saved(copy) == before
    tied.zero_()
    state["0.weight"].zero_()
    group["lr"] = 0.2
    content["tied"].clear()
    assert saved(copy) == before


def test_room_is_what_the_machine_says(memory, monkeypatch, caplog):
    monkeypatch.setattr(staging, "free_host_memory", lambda: 1000)
    assert memory.allows(900)
    assert not memory.allows(901)
    assert "background_checkpoints" in caplog.text
    memory.copy(torch.ones(100))  # memory that is already held needs no more
    assert memory.allows(1900)
    monkeypatch.setattr(staging, "free_host_memory", lambda: None)
    assert memory.allows(2**60)


def test_processes_that_are_forked_do_not_keep_it(memory):
    address = memory.copy(torch.ones(400)).data_ptr()
    for part in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
        begin, end = (int(number, 16) for number in part.partition(" ")[0].split("-"))
        if begin <= address < end:
            assert "dc" in re.search(r"VmFlags: (.*)", part)[1].split()
            return
    raise AssertionError("it is not mapped")
