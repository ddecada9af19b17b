"""The conditioning frames in training follow from weights and each sample's seed."""

import pytest
import torch

from sgm.errors import UserError
from sgm.modules.diffusionmodules.key_frames import KeyFrameDraws, noise_pictures
from sgm.randomness import per_sample


def test_kinds_are_drawn_by_weight():
    torch.manual_seed(0)
    told = KeyFrameDraws({"first": 1, "first_last": 3}).draw(800, 5)
    assert told[:, 0].all() and not told[:, 1:4].any()
    assert 0.7 < told[:, 4].float().mean() < 0.8
    told = KeyFrameDraws({"random": 1}).draw(800, 5)
    assert told.any(dim=1).all() and set(told.sum(dim=1).tolist()) == {1, 2, 3, 4, 5}
    assert (told.float().mean(dim=0) - told.float().mean()).abs().max() < 0.06, "no frame is told more than others"


def test_a_samples_draws_are_its_own():
    draws = KeyFrameDraws({"first": 1, "first_last": 1, "random": 1})
    with per_sample([3, 4, 5]):
        together = draws.draw(3, 7)
    with per_sample([5]):
        assert torch.equal(draws.draw(1, 7), together[2:])


def test_kinds_without_chance():
    draws = KeyFrameDraws({"first": 1, "first_last": 2, "random": 9})
    assert draws.usual == "first_last" and not draws.first_alone
    assert draws.of_kind("first_last", 3).tolist() == [True, False, True]
    assert draws.of_kind("first", 3).tolist() == [True, False, False]
    assert draws.of_kind("first_last", 1).tolist() == [True]
    assert KeyFrameDraws({"first": 0.5}).first_alone


def test_noise_has_one_level_a_sample():
    torch.manual_seed(0)
    noise = noise_pictures(torch.zeros(64, 3, 2, 32, 32)).flatten(3).std(dim=-1)
    level = noise.mean(dim=(1, 2))
    assert (noise / level[:, None, None] - 1).abs().max() < 0.15
    assert abs(level.log().mean() + 3) < 0.3 and abs(level.log().std() - 0.5) < 0.2


@pytest.mark.parametrize("weights", [{}, {"first": -1}, {"last": 1}, {"first": 0}, [1], "first", {"first": True}])
def test_other_weights_are_refused(weights):
    with pytest.raises(UserError, match=r"model\.conditioning: got .*; expected weights of first, first_last, random"):
        KeyFrameDraws(weights)
