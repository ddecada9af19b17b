"""A weighted choice is a function of its draw; training repeats these choices for a seed."""

import pytest
import torch

from sgm.randomness import chosen


def test_each_index_has_its_share_of_the_draws_in_order():
    draws = torch.tensor([0.0, 0.2499999, 0.25, 0.9999999])
    assert chosen(draws, [1, 3]).tolist() == [0, 0, 1, 1]
    assert chosen(draws, [0.2, 0.0, 0.6]).tolist() == [0, 0, 2, 2]
    assert chosen(draws, [0, 5]).tolist() == [1, 1, 1, 1], "a weight of zero is never chosen"
    assert chosen(draws.reshape(2, 2), [1, 1]).dtype == torch.int64


@pytest.mark.parametrize("weights", [[1, 3], [0.1, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1], [2.5]])
def test_choices_are_those_of_earlier_versions(weights):
    """Runs recorded before compare a scaled draw, or shares of a sum, in float64."""
    draws = torch.cat([torch.rand(10000, generator=torch.Generator().manual_seed(0)), torch.arange(256) / 256])
    ends = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    scaled = torch.searchsorted(ends, draws.double() * ends[-1], right=True).clamp(max=len(ends) - 1)
    shares = torch.searchsorted((ends / sum(weights))[:-1], draws.double(), right=True)
    assert torch.equal(chosen(draws, weights), scaled) and torch.equal(chosen(draws, weights), shares)
