"""Test that checkpoints equal those of `torch.save` and are written atomically.

Only one tensor at a time is in memory.
"""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import processes
from cogvideox_sat.conversion.checkpoint_folders import FILE, ITERATION, write_checkpoint, write_tensors
from sgm.errors import UserError

ROOT = Path(__file__).parents[2]

# Writes 400 MB in tensors of 4 MB, and prints by how many MB the peak of the memory rises.
WRITE = """
import re, sys, torch
from pathlib import Path
from cogvideox_sat.conversion.checkpoint_folders import write_tensors
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) // 1024
write_tensors(Path(sys.argv[1]), {"a": torch.empty(1)}, lambda name: torch.ones(1))  # imports what it needs
before = peak()
like = {str(i): torch.empty(10**6, device="meta") for i in range(100)}
write_tensors(Path(sys.argv[1]), like, lambda name: torch.full((10**6,), float(name)))
print(peak() - before)
"""
LIMITED = """
import resource, sys, torch
from pathlib import Path
from cogvideox_sat.conversion.checkpoint_folders import write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
like = {name: torch.empty(10**5, device="meta") for name in "ab"}
write_checkpoint(Path(sys.argv[1]), like, lambda name: torch.ones(10**5))
"""


PATHS = {"PYTHONPATH": f"{ROOT / 'sat'}:{ROOT}"}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(5, 7),
        "half": torch.randn(3, 4, 5).half(),
        "bf16": torch.randn(33).bfloat16(),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "count": torch.tensor(2**40),
        "empty": torch.zeros(0, 3),
        "turned": torch.randn(6, 8).T,
        "flag": torch.tensor([True, False, True]),
        "large": torch.randn(70_001),
    }


@pytest.mark.parametrize("mmap", [False, True])
def test_the_file_reads_as_that_of_torch_save(tmp_path, mmap):
    values = tensors()
    like = {name: torch.empty_like(value, device="meta") for name, value in values.items()}
    asked = []
    write_tensors(tmp_path / "x.pt", like, lambda name: (asked.append(name), values[name])[1], key="k", prefix="p.")
    read = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
    assert list(read) == ["k"]
    assert list(read["k"]) == [f"p.{name}" for name in values]
    assert asked == list(values), "each tensor is asked for once, in order"
    for name, value in values.items():
        assert read["k"][f"p.{name}"].dtype == value.dtype
        assert torch.equal(read["k"][f"p.{name}"], value)
        assert read["k"][f"p.{name}"].is_contiguous()


def test_the_archive_is_a_sound_one(tmp_path):
    """The archive has CRCs, aligned tensors and PyTorch's own description of them."""
    values = {name: value.contiguous() for name, value in tensors().items()}
    write_tensors(tmp_path / "x.pt", values, values.__getitem__, prefix="")
    plain = io.BytesIO()
    torch.save({"module": values}, plain)
    with zipfile.ZipFile(tmp_path / "x.pt") as ours, zipfile.ZipFile(plain) as theirs:
        assert ours.testzip() is None
        names = [
            name for name in theirs.namelist() if "/." not in name
        ]  # the other records hold positions in that file
        assert sorted(ours.namelist()) == sorted(names)
        assert all(ours.read(name) == theirs.read(name) for name in names)
    mapped = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)["module"]
    assert {value.data_ptr() % 64 for value in mapped.values() if value.numel()} == {0}


@pytest.mark.slow
def test_memory_holds_one_tensor(tmp_path):
    command = [sys.executable, "-c", WRITE, str(tmp_path / "x.pt")]
    # Freed tensors go back to the system at once, rather than to a heap that grows by chance.
    environment = {**PATHS, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 40, "megabytes"
    read = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)["module"]
    assert [float(tensor[-1]) for tensor in read.values()] == list(range(100))


@pytest.mark.parametrize("wrong", [torch.zeros(4), torch.zeros(3, dtype=torch.float16)], ids=["shape", "dtype"])
def test_a_tensor_that_is_not_as_announced_leaves_nothing(tmp_path, wrong):
    with pytest.raises(ValueError, match="not as announced"):
        write_checkpoint(tmp_path / "new" / "out", {"a": torch.zeros(3)}, lambda name: wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100, 500_000])
def test_what_the_system_refuses_is_one_line_and_leaves_nothing(tmp_path, limit):
    """The disk is too small for the description, or for the tensors."""
    result = processes.run(["-c", LIMITED, tmp_path / "new" / "out", limit], env=PATHS, timeout=300)
    assert result.stderr.splitlines()[-1].endswith(f"cannot write {tmp_path}/new/out: File too large")
    assert not list(tmp_path.iterdir())


def test_a_damaged_disk_is_noticed(tmp_path, monkeypatch):
    """The new file is read back and compared before it replaces the old one."""
    write_checkpoint(tmp_path / "out", {"a": torch.zeros(3)}, lambda name: torch.ones(3))

    def flip(path: Path, *arguments: object) -> None:
        write_tensors(path, *arguments)
        content = bytearray(path.read_bytes())
        content[content.index(torch.full((3,), 7.0).numpy().tobytes())] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr("cogvideox_sat.conversion.checkpoint_folders.write_tensors", flip)
    with pytest.raises(UserError, match="does not read back"):
        write_checkpoint(tmp_path / "out", {"a": torch.zeros(3)}, lambda name: torch.full((3,), 7.0))
    kept = torch.load(tmp_path / "out" / ITERATION / FILE, weights_only=True)["module"]
    assert [value.tolist() for value in kept.values()] == [[1.0] * 3]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
