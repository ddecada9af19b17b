"""An adapter in processes that share the network.

`tests/sat/test_model_parallel.py` computes with it.
"""

import pytest
import torch
from sat import mpu
from sat.model.finetune.lora2 import LoraLinear
from sat.mpu import ColumnParallelLinear, RowParallelLinear

from cogvideox_sat.network.fused_lora import fuse_adapter
from cogvideox_sat.network.parallel_lora import ParallelLoraLinear
from cogvideox_sat.parallel.process_groups import initialize_process_groups
from sgm.errors import UserError


class Mine(LoraLinear):
    pass


def adapted(kind: type) -> torch.nn.Module:
    """Return a layer of 12 features with an adapter, built by one process for half of two."""
    initialize_process_groups()
    return LoraLinear(kind, 1, 12, 12, r=400, original_obj=kind(12, 12))


@pytest.fixture
def two_processes(monkeypatch):
    layers = adapted(ColumnParallelLinear), adapted(RowParallelLinear)
    monkeypatch.setattr(mpu, "get_model_parallel_world_size", lambda: 2)
    return layers


def test_norms_count_what_is_whole_once(two_processes):
    column, row = map(fuse_adapter, two_processes)
    assert type(column) is type(row) is ParallelLoraLinear
    assert not getattr(column.matrix_A[0], "model_parallel", False) and column.matrix_B[0].model_parallel
    assert row.matrix_A[0].model_parallel and not row.matrix_B[0].model_parallel


def test_values_start_as_those_of_the_whole(two_processes):
    """Uniform up to the root of 1 over the inputs, of which there are twice as many."""
    column, row = map(fuse_adapter, two_processes)
    assert column.matrix_A[0].detach().abs().max() == pytest.approx(12**-0.5, rel=1e-2)
    assert row.matrix_A[0].detach().abs().max() == pytest.approx(24**-0.5, rel=1e-2)


def test_what_processes_cannot_share_is_refused(two_processes):
    """A user's layer with unknown sums, and an adapter on a whole layer, are refused."""
    whole, mine = two_processes
    whole.original, mine.__class__ = torch.nn.Linear(12, 12), Mine
    with pytest.raises(UserError, match="model_parallel_size: Mine applies its adapter in its own way"):
        fuse_adapter(mine)
    with pytest.raises(UserError, match="model_parallel_size: processes cannot share an adapter on Linear"):
        fuse_adapter(whole)
