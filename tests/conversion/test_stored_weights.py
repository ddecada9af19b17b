"""Test that tensors are read and written one by one, through maps that are renewed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cogvideox_sat.conversion import stored_weights
from cogvideox_sat.conversion.assembled_weights import assembled
from cogvideox_sat.conversion.diffusers_folders import write_part
from cogvideox_sat.conversion.safetensors_writing import check_equal, split, stream_safetensors
from cogvideox_sat.conversion.stored_weights import Stored, StoredWeights, open_weights
from cogvideox_sat.weights.diffusers_names import Piece
from sgm.errors import UserError

ROOT = Path(__file__).parents[2]

# Converts 600 MB, of which no tensor has more than 4 MB, twice, into files of at most so many MB, and prints by how
# many MB the peak of the memory rises.
CONVERT = """
import re, sys, torch
from pathlib import Path
from cogvideox_sat.conversion.diffusers_folders import write_part
from cogvideox_sat.conversion.stored_weights import open_weights
from sgm.weights import safetensors_in
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) // 1024
torch.zeros(1).add_(1)
before = peak()
source, first, second = map(Path, sys.argv[1:4])
write_part(first, {}, open_weights(source).cast(torch.bfloat16), int(sys.argv[4]) * 10**6)
write_part(second, {}, open_weights(safetensors_in(first)), int(sys.argv[4]) * 10**6)
print(peak() - before)
"""


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.int64)
    small = {"bits": torch.tensor([True, False]), "small": torch.tensor([0.5, -448.0]).to(torch.float8_e4m3fn)}
    small |= {"number": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    return {f"w{i}": (torch.randn(3, i + 1) * 9).to(dtypes[i % 4]) for i in range(9)} | small


@pytest.mark.parametrize("window", [0, 50, 10**9])
def test_reading_whatever_the_window(tmp_path, monkeypatch, window):
    monkeypatch.setattr(stored_weights, "WINDOW_BYTES", window)
    torch.save({"module": weights()}, tmp_path / "a.pt")
    save_file(weights(), tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        stored = open_weights(tmp_path / name)
        for _ in range(2):
            assert stored.keys() == weights().keys()
            assert all(torch.equal(stored[key], tensor) for key, tensor in weights().items())
        assert {key: (like.shape, like.dtype) for key, like in stored.like.items()} == {
            key: (tensor.shape, tensor.dtype) for key, tensor in weights().items()
        }


def test_what_is_written_is_what_the_library_writes(tmp_path):
    save_file(weights(), tmp_path / "theirs.safetensors")
    stream_safetensors(tmp_path / "ours.safetensors", open_weights(tmp_path / "theirs.safetensors"))
    ours, theirs = load_file(tmp_path / "ours.safetensors"), weights()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_of_limited_size_and_their_index(tmp_path):
    save_file(weights(), tmp_path / "all.safetensors")
    stored = open_weights(tmp_path / "all.safetensors")
    shards = split(stored, 100)
    assert [name for shard in shards for name in shard] == list(stored)
    assert all(shard.nbytes <= 100 or len(shard) == 1 for shard in shards) and len(shards) > 2
    write_part(tmp_path / "part", {"a": 1}, stored, 100)
    index = tmp_path / "part" / "diffusion_pytorch_model.safetensors.index.json"
    assert len(stored_weights.shard_files(index)) == len(shards)
    check_equal(open_weights(index), stored, tmp_path)


def test_damage_is_found_when_it_is_read_back(tmp_path):
    save_file(weights(), tmp_path / "a.safetensors")
    changed = weights()
    changed["w3"][0, 0] += 1
    save_file(changed, tmp_path / "b.safetensors")
    stored = open_weights(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="w3 differs; check the disk"):
        check_equal(open_weights(tmp_path / "b.safetensors"), stored, tmp_path)
    with pytest.raises(UserError, match="it holds other tensors"):
        check_equal(stored.select(["w1"]), stored, tmp_path)


def test_casting(tmp_path):
    save_file(
        {"large": torch.tensor([1e30]), "count": torch.tensor([3]), "inf": torch.tensor([torch.inf])},
        tmp_path / "a.safetensors",
    )
    cast = open_weights(tmp_path / "a.safetensors").cast(torch.float16)
    assert cast["count"].dtype == torch.int64 and cast["inf"].item() == torch.inf
    with pytest.raises(UserError, match="large is out of the range of float16"):
        cast["large"]


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [1000, 20])
@pytest.mark.long
def test_memory_does_not_grow_with_files_or_their_number(tmp_path, megabytes):
    """Source and result are read side by side, so two windows are mapped at most."""
    torch.save({"module": {f"w{i}": torch.ones(2**20) for i in range(150)}}, tmp_path / "a.pt")
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'sat'}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    # Freed tensors are returned to the system at once, so that the peak does not include memory kept by malloc.
    environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    command = [sys.executable, "-c", CONVERT, tmp_path / "a.pt", tmp_path / "one", tmp_path / "two", megabytes]
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=True)
    assert int(result.stdout.split()[-1]) < 2 * stored_weights.WINDOW_BYTES / 2**20 + 16


@pytest.mark.parametrize(
    ("first", "second", "widest"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e4m3fn),
        (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16),
    ],
)
def test_pieces_of_different_dtypes_make_a_tensor_of_the_widest(first, second, widest):
    """The announced dtype is that of the tensor which is read, and no value changes."""
    parts = {"a": torch.full((1, 2), 1 / 3).to(first), "b": torch.full((1, 2), 200.0).to(second)}
    stored = StoredWeights({name: Stored.of(tensor) for name, tensor in parts.items()})
    made = assembled({"ab": (Piece("a"), Piece("b"))}, stored)
    assert made["ab"].dtype == made.entries["ab"].dtype == widest
    assert torch.equal(made["ab"].float(), torch.cat([tensor.float() for tensor in parts.values()]))
