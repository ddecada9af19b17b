"""Guidance and its limits, by their equations."""

import pytest
import torch

from seeded import seeded_input
from sgm.errors import UserError
from sgm.modules.diffusionmodules.thresholding import (
    DynamicThresholding,
    DynamicThresholdingV1,
    DynamicThresholdingV2,
    NoDynamicThresholding,
    StaticThresholding,
)

SHAPE = (2, 3, 4, 5, 6)  # batch, frames, channels, height, width
KINDS = [NoDynamicThresholding, StaticThresholding, DynamicThresholding, DynamicThresholdingV1, DynamicThresholdingV2]


@pytest.fixture
def halves():
    return seeded_input("uncond", SHAPE), seeded_input("cond", SHAPE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_depends_on_its_own_half_and_scale_alone(halves, kind):
    uncond, cond = halves
    both = kind()(uncond, cond, torch.tensor([3.0, 7.0]))
    alone = [kind()(uncond[i : i + 1], cond[i : i + 1], scale) for i, scale in enumerate((3.0, 7.0))]
    torch.testing.assert_close(both, torch.cat(alone))


def test_guidance_and_its_cut(halves):
    uncond, cond = halves
    guided = uncond + 6 * (cond - uncond)
    torch.testing.assert_close(NoDynamicThresholding()(uncond, cond, 6), guided)
    torch.testing.assert_close(StaticThresholding(0.5)(uncond, cond, 6), guided.clip(-0.5, 0.5))


def test_the_spread_is_that_of_the_unconditional_half(halves):
    uncond, cond = halves
    limited, guided = (kind()(uncond, cond, 6) for kind in (DynamicThresholding, NoDynamicThresholding))
    for x, own, u in zip(limited, guided, uncond, strict=True):
        torch.testing.assert_close(x.mean(), own.mean())
        torch.testing.assert_close(x.std(), u.std())


def test_the_spread_of_channels_is_that_of_a_weaker_scale(halves):
    uncond, cond = halves
    limited = DynamicThresholdingV2(2.0)(uncond, cond, 6)
    mimic = NoDynamicThresholding()(uncond, cond, 2.0)
    torch.testing.assert_close(limited.std((1, 3, 4)), mimic.std((1, 3, 4)))


def test_outliers_are_cut_off_at_a_quantile_of_the_whole_sample(halves):
    uncond, cond = halves
    guided = NoDynamicThresholding()(uncond, cond, 6)
    mean = guided.mean((1, 3, 4), keepdim=True)
    deviation = (guided - mean).abs()
    limited = (DynamicThresholdingV1(quantile=0.5)(uncond, cond, 6) - mean).abs()
    for before, after in zip(deviation, limited, strict=True):
        limit = before.flatten().sort().values[before.numel() // 2 - 1]
        torch.testing.assert_close(after, before.clamp(max=limit.item()))
    torch.testing.assert_close(DynamicThresholdingV1(quantile=1.0)(uncond, cond, 6), guided)


@pytest.mark.parametrize("make", [lambda: StaticThresholding(0), lambda: DynamicThresholdingV1(quantile=0.0)])
def test_limits_are_checked(make):
    with pytest.raises(UserError, match="dyn_thresh_config"):
        make()


@pytest.mark.parametrize("kind", KINDS)
def test_constants_stay_finite(kind):
    zeros = torch.zeros(SHAPE)
    assert torch.equal(kind()(zeros, zeros, 6.0), zeros)
