"""The running average of a model's weights."""

import pytest
import torch
from torch import nn

from sgm.modules.ema import LitEma
from support import assert_close


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))


def change(model: nn.Module, by: float = 1.0) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by


@pytest.mark.parametrize("warm_up", [True, False])
def test_each_update_moves_the_average_towards_the_weights(warm_up):
    net = model()
    ema = LitEma(net, decay=0.25, use_num_upates=warm_up)
    expected = net[0].weight.detach().double()
    for n in range(1, 5):
        change(net)
        ema(net)
        decay = min(0.25, (1 + n) / (10 + n)) if warm_up else 0.25
        expected = decay * expected + (1 - decay) * net[0].weight.detach().double()
        assert_close(ema.shadows()["0.weight"], expected, 1e-6)
    assert ema.num_updates == 4


def test_only_what_is_trained_is_averaged_and_nothing_else_is_kept():
    net = model()
    net[0].bias.requires_grad_(False)
    ema = LitEma(net, skip=["2."])
    assert set(ema.shadows()) == {"0.weight", "1.weight", "1.bias"}
    assert set(ema.state_dict()) == {"num_updates", "0weight", "1weight", "1bias"}
    assert not list(ema.parameters())


def test_names_that_differ_only_in_their_dots_are_kept_apart():
    net = nn.Module()
    for name in ("1", "11"):
        net.add_module(name, nn.ModuleDict({"11" if name == "1" else "1": nn.Linear(2, 2, bias=False)}))
    ema = LitEma(net)
    change(net)
    ema(net)
    shadows = ema.shadows()
    assert set(shadows) == {"1.11.weight", "11.1.weight"}
    assert not torch.equal(*shadows.values())


def test_the_averages_can_take_the_place_of_the_weights_and_give_it_back():
    net = model()
    ema = LitEma(net)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    change(net)
    trained = [parameter.detach().clone() for parameter in net.parameters()]
    ema.store(net.parameters())
    ema.copy_to(net)
    assert all(map(torch.equal, net.parameters(), before))
    ema.restore(net.parameters())
    assert all(map(torch.equal, net.parameters(), trained))


def test_a_saved_average_goes_on_where_it_was():
    """The decay is a setting, and not among what is saved."""
    net = model()
    ema = LitEma(net, decay=0.9)
    for _ in range(3):
        change(net)
        ema(net)
    other = LitEma(net, decay=0.9)
    other.load_state_dict(ema.state_dict())
    change(net)
    for each in (ema, other):
        each(net)
    assert all(map(torch.equal, ema.buffers(), other.buffers()))


def test_half_precision_weights_have_averages_of_their_kind():
    net = model().to(torch.bfloat16)
    ema = LitEma(net, decay=0.5, use_num_upates=False)
    before = net[0].weight.detach().clone()
    change(net, by=2.0)
    ema(net)
    assert ema.shadows()["0.weight"].dtype == torch.bfloat16
    assert_close(ema.shadows()["0.weight"], before.double() + 1.0, 1e-2)


def test_a_decay_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"1\.5"):
        LitEma(model(), decay=1.5)
