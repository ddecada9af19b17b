"""One moving average, whoever keeps it: a module's, and those of two optimizers."""

import pytest
import torch
from torch import nn

from sgm.ema_adam import EmaAdam
from sgm.modules.ema import LitEma
from sgm.moving_averages import follow, kept_share
from sgm.muon import Muon
from support import assert_close


@pytest.mark.parametrize("warm_up", [True, False])
def test_the_share_is_the_same_as_a_number_and_on_a_device(warm_up):
    for decay in (0.0, 0.25, 0.9999, 1.0):
        for step in (1, 2, 10, 1000, 200_000):
            expected = min(decay, (1 + step) / (10 + step)) if warm_up else decay
            assert kept_share(decay, step, warm_up) == expected
            share = kept_share(decay, torch.tensor(step), warm_up)
            assert (share.dtype, share.item()) == (torch.float64, expected)


def test_nothing_waits_for_the_device():
    """Tensors of the meta device have no values that could be looked at."""
    step = torch.tensor(3, device="meta")
    averages = [torch.empty(2, 3, device="meta", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    follow(averages, [average.clone() for average in averages], kept_share(0.9, step))


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_update(as_tensor, dtype):
    torch.manual_seed(0)
    averages, weights = ([torch.randn(shape).to(dtype) for shape in ((3, 4), (5,), ())] for _ in range(2))
    expected = [0.75 * a.double() + 0.25 * w.double() for a, w in zip(averages, weights, strict=True)]
    places = [average.data_ptr() for average in averages]
    follow(averages, weights, torch.tensor(0.75, dtype=torch.float64) if as_tensor else 0.75)
    assert [average.data_ptr() for average in averages] == places
    for average, each in zip(averages, expected, strict=True):
        assert_close(average.double(), each, 1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("kind", [EmaAdam, Muon])
def test_an_optimizers_average_is_bit_for_bit_that_of_a_module(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, dtype=torch.bfloat16))
    optimizer, module = kind(net.parameters(), lr=0.1, ema_decay=0.5), LitEma(net, decay=0.5)
    for _ in range(12):  # over the end of the warm-up
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        module(net)
    for name, parameter in net.named_parameters():
        assert torch.equal(module.shadows()[name], optimizer.state[parameter]["shadow"]), name
        assert not torch.equal(module.shadows()[name], parameter)
