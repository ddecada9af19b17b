"""The samplers against the recorded reference numbers, and what they promise beyond them."""

import itertools
import math

import pytest
import torch

from sampler_cases import (
    EVERY_COMBINATION,
    NOISELESS,
    SCHEDULES,
    SIGMA,
    VANILLA,
    VIDEO,
    VIDEO_SAMPLERS,
    inputs,
    make_sampler,
    sigma_denoiser,
    video_denoiser,
)
from seeded import seeded_input
from sgm.errors import UserError
from sgm.modules.diffusionmodules import sampling, sampling_utils
from sgm.util import instantiate_from_config
from support import assert_close


@pytest.mark.parametrize("name", VIDEO.case["cases"])
def test_video_sampler_gives_the_reference_numbers(name):
    config = VIDEO.case["cases"][name]
    denoiser = video_denoiser(config["params"]["discretization_config"])
    torch.manual_seed(VIDEO.case["torch_manual_seed"])
    assert_close(instantiate_from_config(config)(denoiser, *inputs(VIDEO)), VIDEO[name], 2e-5)


@pytest.mark.parametrize("name", SIGMA.case["cases"])
def test_sigma_sampler_gives_the_reference_numbers(name):
    torch.manual_seed(SIGMA.case["torch_manual_seed"])
    sampler = instantiate_from_config(SIGMA.case["cases"][name])
    assert_close(sampler(sigma_denoiser(), *inputs(SIGMA)), SIGMA[name], 2e-5)


@pytest.mark.parametrize(("name", "schedule"), [pair for pair in EVERY_COMBINATION if pair[0] in NOISELESS])
def test_samplers_solve_the_probability_flow(name, schedule):
    """For data N(0, d²) noise x of level (a, s) becomes x·d/sqrt(a²d² + s²)."""
    d = 0.5

    def ideal_video(x, alpha, cond, **model_inputs):
        a = alpha.reshape(-1, 1, 1, 1, 1)
        return a * d**2 / (a**2 * d**2 + 1 - a**2) * x

    def ideal_sigma(x, sigma, cond, **model_inputs):
        s = sigma.reshape(-1, 1, 1, 1, 1)
        return d**2 / (d**2 + s**2) * x

    sampler = make_sampler(name, schedule, num_steps=400)
    noise = seeded_input("noise", (2, 1, 1, 3, 4))
    a, s, _ = sampler.schedule(400)
    start = ((a[0] * d) ** 2 + s[0] ** 2) ** 0.5 / (a[0] ** 2 + s[0] ** 2) ** 0.5
    # The last step ends at the denoised sample, not on the flow.
    end = a[-2] * d**2 / ((a[-2] * d) ** 2 + s[-2] ** 2) ** 0.5
    first_order = name in ("VideoDDIMSampler", "EulerEDMSampler")
    ideal = ideal_video if name in VIDEO_SAMPLERS else ideal_sigma
    assert_close(sampler(ideal, noise, {}), noise * end / start, 2e-2 if first_order else 2e-3)


def test_churn_and_ancestral_noise():
    """With s_churn or eta > 0 samples depend on the seed; eta = 0 equals Euler's method."""
    noise, cond, _ = inputs(SIGMA)
    samples = {}
    for label, name, options in (
        ("euler", "EulerEDMSampler", {}),
        ("churned", "HeunEDMSampler", {"s_churn": 2.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}),
        ("ancestral", "EulerAncestralSampler", {"eta": 0.5}),
        ("eta 0", "EulerAncestralSampler", {"eta": 0.0}),
    ):
        sampler = make_sampler(name, "edm", **options)
        samples[label] = [
            sampler(sigma_denoiser(), noise, cond, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
        ]
    assert_close(samples["eta 0"][0], samples["euler"][0], 1e-5)
    assert torch.equal(*samples["eta 0"])
    for label in ("churned", "ancestral"):
        assert samples[label][0].isfinite().all() and not torch.allclose(*samples[label])


def test_ddpm_steps_have_the_mean_and_spread_of_every_level():
    """With an exact network each x is a draw from N(a·x0, s²), for any number of steps."""
    seen = []

    def denoiser(x, alpha, cond, **model_inputs):
        seen.append((alpha[0].item(), x))
        return torch.full_like(x, 0.7)

    torch.manual_seed(0)
    sampler = make_sampler("VideoDDPMSampler", num_steps=7)
    sample = sampler(denoiser, torch.randn(1, 2, 4, 100, 100), {"crossattn": torch.zeros(1, 7, 8)})
    assert len(seen) == 7 and (sample - 0.7).abs().max() == 0
    for a, x in seen:
        s = math.sqrt(1 - a * a)
        assert abs(x.mean() - 0.7 * a) < 0.02 * s + 1e-6
        assert abs(x.std() / s - 1) < 0.02


def test_a_ddpm_step_is_the_first_step_of_the_stochastic_solver():
    """Both are the exact first-order solution; they part from the second step on."""
    seen = {}
    noise = seeded_input("noise", (2, 3, 4, 5, 6), 0)
    for name in ("VideoDDPMSampler", "VPSDEDPMPP2MSampler"):

        def denoiser(x, alpha, cond, name=name, **model_inputs):
            seen.setdefault(name, []).append(x)
            return x.tanh()

        torch.manual_seed(1)
        make_sampler(name, "legacy")(denoiser, noise, {"crossattn": torch.zeros(2, 7, 8)})
    one, other = seen.values()
    assert_close(one[1], other[1], 1e-6)
    assert (one[2] - other[2]).norm() > 0.01 * one[2].norm()


def test_ddim_with_fresh_noise():
    """x' = x + (σ'·sqrt(1 − k²) − σ)·d + k·σ'·ε; without fresh noise it is Euler's method."""
    noise, cond, _ = inputs(SIGMA)
    run = {"denoiser": sigma_denoiser(), "x": noise, "cond": cond}
    euler = make_sampler("EulerEDMSampler", "edm")(**run)
    assert torch.equal(make_sampler("DDIMSampler", "edm", s_noise=0.0)(**run), euler)
    torch.manual_seed(3)
    sample = make_sampler("DDIMSampler", "edm", s_noise=0.6)(**run)
    sigmas = [*instantiate_from_config(SCHEDULES["edm"])(5, do_append_zero=True).double().tolist()]
    torch.manual_seed(3)
    x = noise.double() * math.sqrt(1 + sigmas[0] ** 2)
    for sigma, after in itertools.pairwise(sigmas):
        level = torch.full((2,), sigma, dtype=torch.float32)
        d = (x - run["denoiser"](x.float(), level, cond).double()) / sigma
        x = x + (0.8 * after - sigma) * d
        if after:
            x = x + 0.6 * after * torch.randn(noise.shape)
    assert_close(sample, x.float(), 1e-5)


class OwnEuler(sampling.BaseDiffusionSampler):
    """Euler's method, written as samplers for the original are."""

    def __call__(self, denoiser, x, cond, uc=None, num_steps=None):
        x, s_in, sigmas, num_sigmas, cond, uc = self.prepare_sampling_loop(x, cond, uc, num_steps)
        for i in self.get_sigma_gen(num_sigmas):
            d = sampling_utils.to_d(x, s_in * sigmas[i], self.denoise(x, denoiser, s_in * sigmas[i], cond, uc))
            x = x + (sigmas[i + 1] - sigmas[i]) * d
        return x


@pytest.mark.parametrize("guided", [False, True])
def test_a_sampler_of_ones_own_on_the_base_of_the_original(guided, capsys):
    config = {"guider_config": VANILLA} if guided else {}
    params = {"discretization_config": SCHEDULES["edm"], "num_steps": 5, **config}
    own = instantiate_from_config({"target": f"{__name__}.OwnEuler", "params": params})
    arguments = (sigma_denoiser(), *inputs(SIGMA))
    assert_close(own(*arguments), make_sampler("EulerEDMSampler", "edm", **config)(*arguments), 1e-5)
    assert capsys.readouterr().err == ""
    OwnEuler(SCHEDULES["edm"], 3, None, True, "cpu")(*arguments)
    assert "3/3" in capsys.readouterr().err
    with pytest.raises(UserError, match="OwnEuler needs a schedule of sigma"):
        OwnEuler(SCHEDULES["zerosnr"], 3)(*arguments)
    with pytest.raises(UserError, match="num_steps: missing"):
        OwnEuler(SCHEDULES["edm"])(*arguments)


def test_step_formulas_by_tensor():
    """The functions by the names of the original are those of the samplers."""
    down, up = sampling_utils.get_ancestral_step(torch.tensor([5.0, 3.0]), torch.tensor([2.0, 0.0]), eta=0.7)
    for i, (sigma, after) in enumerate(((5.0, 2.0), (3.0, 0.0))):
        assert (down[i].item(), up[i].item()) == pytest.approx(sampling_utils.ancestral_step(sigma, after, 0.7))
    sigma = torch.tensor([0.5, 4.0])
    assert_close(sampling_utils.to_sigma(sampling_utils.to_neg_log_sigma(sigma)), sigma, 1e-6)
    levels = [9.0, 5.0, 2.0, 1.0]
    expected = sampling_utils.linear_multistep_coefficients(levels[:3], 1.0)
    assert [sampling_utils.linear_multistep_coeff(3, levels, 2, j) for j in range(3)] == expected[::-1]
    x, denoised = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert_close(sampling_utils.to_d(x, sigma, denoised)[1], (x[1] - denoised[1]) / 4.0, 1e-6)
