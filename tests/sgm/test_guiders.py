"""Guiders and thresholding follow their formulas, also those written for another sampler."""

import math

import numpy as np
import pytest
import torch

from sampler_cases import (
    MODULES,
    VANILLA,
    VIDEO,
    VIDEO_SAMPLERS,
    inputs,
    make_denoiser,
    make_sampler,
)
from sgm.errors import UserError
from sgm.modules.diffusionmodules.guiders import DynamicCFG
from sgm.util import instantiate_from_config
from support import assert_close


def test_dynamic_guidance_weight():
    """1 + scale·(1 − cos(π·(k/n)^exp))/2 with k = n − timestep, or the share of steps."""
    denoised = torch.cat([torch.zeros(1, 4), torch.ones(1, 4)])
    k, n = 50 - 979, 50
    by_timestep = DynamicCFG(scale=6, exp=5, num_steps=n)(denoised, None, step_index=k, progress=0.5)
    assert by_timestep[0, 0].item() == pytest.approx(1 + 3 * (1 - math.cos(math.pi * (k / n) ** 5)), rel=1e-6)
    by_step = DynamicCFG(scale=6, exp=0.5, num_steps=n, count="step")(denoised, None, step_index=k, progress=0.25)
    assert by_step[0, 0].item() == pytest.approx(1 + 3 * (1 - math.cos(math.pi * 0.5)), rel=1e-6)
    with pytest.raises(UserError, match="count: got 'steps'"):
        DynamicCFG(scale=6, exp=5, num_steps=n, count="steps")
    with pytest.raises(UserError, match=r"exp: got 2\.5"):
        DynamicCFG(scale=6, exp=2.5, num_steps=n)


def test_dynamic_guidance_counts_as_diffusers_does():
    """(n − timestep)/n for the call's n steps; "timestep" uses the configured number."""
    schedule = "zerosnr"
    seen: dict[str, list[float]] = {}
    for count in ("timestep", "diffusers"):
        weights = seen[count] = []
        guider = {"target": f"{MODULES}.guiders.DynamicCFG", "params": {"scale": 6, "exp": 5, "num_steps": 50}}
        guider["params"]["count"] = count
        sampler = make_sampler("VideoDDIMSampler", schedule, guider_config=guider, num_steps=50)
        sampler.guider.dyn_thresh = lambda u, c, w, weights=weights: weights.append(w) or u + w * (c - u)
        for steps in (50, 20):
            sampler(make_denoiser("VideoDDIMSampler", schedule), *inputs(VIDEO), num_steps=steps)
    assert seen["timestep"][:50] == seen["diffusers"][:50] and seen["timestep"][50:] != seen["diffusers"][50:]
    timesteps = np.linspace(999, 0, 20, endpoint=False).astype(int)
    for name, n in (("timestep", 50), ("diffusers", 20)):
        expected = [1 + 6 * (1 - math.cos(math.pi * ((n - int(t)) / n) ** 5)) / 2 for t in timesteps]
        assert seen[name][50:] == expected


def test_thresholding():
    """Every kind follows its formula, on samples of a batch that have scales of their own."""
    torch.manual_seed(0)
    uncond, cond = 3 * torch.randn(2, 3, 4, 6, 5) + 1, 2 * torch.randn(2, 3, 4, 6, 5)
    w = torch.tensor([2.0, 9.0])
    guided = torch.stack([u + each * (c - u) for u, c, each in zip(uncond, cond, w, strict=True)])
    mimic = uncond + 4 * (cond - uncond)

    def guide(kind, **params):
        config = {"target": f"{MODULES}.sampling_utils.{kind}", "params": params}
        guider = instantiate_from_config(
            {"target": f"{MODULES}.guiders.VanillaCFG", "params": {"scale": 6.0, "dyn_thresh_config": config}}
        )
        return guider(torch.cat([uncond, cond]), None, scale=w)

    assert torch.equal(guide("NoDynamicThresholding"), guided)
    assert torch.equal(guide("StaticThresholding"), guided.clamp(-1, 1))
    assert torch.equal(guide("StaticThresholding", limit=2.5), guided.clamp(-2.5, 2.5))
    spread, cut = guide("DynamicThresholding"), guide("DynamicThresholdingV1", quantile=0.9)
    like_mimic = guide("DynamicThresholdingV2", mimic_scale=4.0)
    for i in range(2):
        assert_close(spread[i].mean(), guided[i].mean(), 1e-4)
        assert_close(spread[i].std(), uncond[i].std(), 1e-4)
        centred = guided[i] - guided[i].mean((0, 2, 3), keepdim=True)
        limit = centred.abs().flatten().sort().values[math.ceil(0.9 * centred.numel()) - 1]
        assert_close(cut[i], guided[i] - centred + centred.clamp(-limit, limit), 1e-5)
        assert 0.05 < (cut[i] != guided[i]).float().mean() < 1
        for channel in range(4):
            assert_close(like_mimic[i, :, channel].mean(), guided[i, :, channel].mean(), 1e-4)
            assert_close(like_mimic[i, :, channel].std(), mimic[i, :, channel].std(), 1e-4)
    alone = instantiate_from_config({"target": f"{MODULES}.sampling_utils.DynamicThresholding"})
    assert_close(alone(uncond[1:], cond[1:], 9.0), spread[1:], 1e-6)  # whatever else is in the batch
    assert_close(guide("DynamicThresholdingV1", quantile=1.0, scale_factor=0.7), guided, 1e-6)


def test_thresholding_acts_in_sampling_and_dynamic_guidance_takes_it():
    noise, cond, uncond = inputs(VIDEO)
    samples = []
    for config in (None, {"target": f"{MODULES}.sampling_utils.StaticThresholding", "params": {"limit": 0.01}}):
        params = {"scale": 6.0, "exp": 5, "num_steps": 5, "dyn_thresh_config": config}
        sampler = make_sampler(
            "VideoDDIMSampler", guider_config={"target": f"{MODULES}.guiders.DynamicCFG", "params": params}
        )
        samples.append(sampler(make_denoiser("VideoDDIMSampler"), noise, cond, uncond))
    assert samples[0].abs().max() > 0.1 and samples[1].abs().max() <= 0.01
    for kind, mistake, message in (
        ("StaticThresholding", {"limit": 0}, "limit: got 0"),
        ("DynamicThresholdingV1", {"quantile": 1.1}, r"quantile: got 1\.1"),
    ):
        with pytest.raises(UserError, match=message):
            instantiate_from_config({"target": f"{MODULES}.sampling_utils.{kind}", "params": mistake})
    with pytest.raises(UserError, match=r"Identity cannot be called with \(uncond, cond, scale\)"):
        DynamicCFG(6.0, 5, 50, {"target": "torch.nn.Identity"})


class ForeignGuider:
    """A guider of another sampler: it takes a scale at most."""

    def prepare_inputs(self, x, s, c, uc):
        return torch.cat([x] * 2), torch.cat([s] * 2), {kind: torch.cat([uc[kind], c[kind]]) for kind in c}

    def __call__(self, x, sigma, scale=None):
        uncond, cond = x.chunk(2)
        return uncond + (6.0 if scale is None else scale) * (cond - uncond)


@pytest.mark.parametrize("name", ["VPSDEDPMPP2MSampler", "HeunEDMSampler"])
def test_a_guider_of_another_sampler_is_told_what_it_takes(name):
    schedule = "zerosnr" if name in VIDEO_SAMPLERS else "edm"
    samples = []
    for config in (VANILLA, {"target": f"{__name__}.ForeignGuider"}):
        torch.manual_seed(0)
        sampler = make_sampler(name, schedule, guider_config=config)
        samples.append(sampler(make_denoiser(name, schedule), *inputs(VIDEO)))
    assert torch.equal(*samples)


def test_dynamic_guidance_takes_the_step_as_its_third_argument():
    denoised, sigma = torch.randn(2, 4), torch.ones(1)
    guider = DynamicCFG(6, 5, 50)
    assert torch.equal(guider(denoised, sigma, 20), guider(denoised, sigma, step_index=20))
    assert torch.equal(guider(denoised, sigma, 20, 3.0), guider(denoised, sigma, step_index=20, scale=3.0))
    assert not torch.equal(guider(denoised, sigma, 20), guider(denoised, sigma, 30))


@pytest.mark.parametrize(("count", "told"), [("timestep", {"progress": 0.5}), ("step", {"step_index": 20})])
def test_dynamic_guidance_says_what_a_sampler_does_not_tell_it(count, told):
    missing = "step_index" if count == "timestep" else "progress"
    with pytest.raises(UserError, match=rf"DynamicCFG: .* {missing}.*count '{count}'"):
        DynamicCFG(6, 5, 50, count=count)(torch.randn(2, 4), torch.ones(1), **told)
