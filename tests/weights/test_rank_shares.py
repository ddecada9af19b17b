"""Shares of a network's tensors: cut and joined to the bit, told by names as by layers."""

import pytest
import torch

from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.weights.rank_shares import Cut, cuts_by_name, cuts_of, plain, recut
from sgm.errors import UserError
from support import Reference


@pytest.mark.parametrize("name", ["t2v_2b", "t2v_5b", "i2v_5b", "t2v_15", "i2v_15", "t2v_2b_lora", "i2v_5b_lora"])
def test_names_tell_what_layers_do(name):
    network = instantiate_on_meta(Reference(f"dit/{name}").case["network_config"])
    cuts, names = cuts_of(network), network.state_dict().keys()
    assert cuts_by_name(names) == {name: cut for name, cut in cuts.items() if name in map(plain, names)}
    assert ("lora" in name) == any("matrix" in name for name in cuts)


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("cut", [Cut(0), Cut(1), Cut(0, (1, 1, 1)), Cut(0, (2, 1))])
def test_shares_are_cut_anew_to_the_bit(cut, sizes):
    written, wanted = sizes
    whole = torch.arange(36 * 24).view(36, 24)
    shares = [{"x.original.weight": cut.share(whole, rank, written), "y": whole} for rank in range(written)]
    assert cut.whole_shape(shares[0]["x.original.weight"].shape, written) == whole.shape
    for rank in range(wanted):
        weights = recut(shares, {"x.weight": cut}, rank, wanted, "them")
        assert torch.equal(weights["x.original.weight"], cut.share(whole, rank, wanted))
        assert torch.equal(weights["y"], whole)


def test_every_rank_has_a_share_of_each_part():
    share = Cut(0, (1, 1, 1)).share(torch.arange(12)[:, None], 1, 2)
    assert share.flatten().tolist() == [2, 3, 6, 7, 10, 11]


def test_what_cannot_be_shared_is_one_line():
    with pytest.raises(UserError, match=r"model_parallel_size: 5 does not divide a tensor of shape \(12, 2\)"):
        Cut(0).share(torch.zeros(12, 2), 0, 5)
    with pytest.raises(UserError, match="them: the files of the model-parallel ranks do not hold the same tensors"):
        recut([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}], {}, 0, 1, "them")
