"""The installed PyTorch has the undocumented parts in use, with the same meaning."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from cogvideox_sat.parallel.torch_internals import CHECKED, abort_groups, all_groups, own_store
from distributed import run_distributed

ROOT = Path(__file__).parents[2]
GONE = f"PyTorch {torch.__version__} lacks it; torch_internals was checked with {CHECKED}"
NAMES = ("_world", "_get_default_store", "_abort_process_group")


def test_the_installed_version_has_all_that_is_used():
    for name in NAMES:
        assert hasattr(distributed_c10d, name), f"{name}: {GONE}"
    assert hasattr(distributed_c10d._world, "pg_map"), f"_world.pg_map: {GONE}"


def use_all() -> tuple[list[bool], str, bool]:
    groups = [dist.group.WORLD, dist.new_group([dist.get_rank()])]
    found = [group in all_groups() for group in groups]
    if dist.get_rank() == 0:
        own_store().set("told", "by rank 0")
    told = own_store().get("told").decode()
    dist.barrier()
    abort_groups()
    return found, told, dist.is_initialized()


@pytest.mark.distributed
@pytest.mark.slow
def test_they_do_what_they_are_used_for():
    assert run_distributed(use_all, 2) == [([True, True], "by rank 0", False)] * 2


def test_no_other_module_names_them():
    pattern = re.compile(rf"distributed_c10d|\.({'|'.join(NAMES)})\b")
    found = [
        path.name
        for folder in ("sat", "sgm", "tools", "vae_modules")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "torch_internals.py" and pattern.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []
