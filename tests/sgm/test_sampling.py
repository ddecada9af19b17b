"""The samplers against the recorded reference numbers, and what they promise beyond them."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sampler_cases import (
    EVERY_COMBINATION,
    MODULES,
    NOISELESS,
    SCHEDULES,
    SIGMA,
    SIGMA_SAMPLERS,
    VANILLA,
    VIDEO,
    VIDEO_SAMPLERS,
    inputs,
    make_denoiser,
    make_sampler,
    sigma_denoiser,
    sigma_network,
    video_denoiser,
    video_network,
)
from seeded import seeded_input
from sgm.errors import UserError
from sgm.modules.diffusionmodules import sampling, sampling_utils
from sgm.modules.diffusionmodules.guiders import DynamicCFG
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


class CountingNetwork:
    """Passes calls on, keeping the batch sizes, the timesteps and the other inputs."""

    def __init__(self, network):
        self.network, self.batches, self.timesteps, self.model_inputs = network, [], [], []

    def __call__(self, x, t, cond, **model_inputs):
        self.batches.append(len(x))
        self.timesteps.append(t.tolist())
        self.model_inputs.append(model_inputs)
        return self.network(x, t, cond, **model_inputs)


@pytest.mark.parametrize(("name", "schedule"), EVERY_COMBINATION)
@pytest.mark.parametrize("guider", ["IdentityGuider", None])
def test_without_guidance_the_network_sees_the_conditional_batch_alone(name, schedule, guider):
    network = CountingNetwork(video_network if name in VIDEO_SAMPLERS else sigma_network)
    config = {"guider_config": {"target": f"{MODULES}.guiders.{guider}"}} if guider else {}
    noise, cond, uncond = inputs(VIDEO)
    sample = make_sampler(name, schedule, **config)(make_denoiser(name, schedule, network), noise, cond, uncond)
    assert sample.isfinite().all() and sample.shape == noise.shape
    assert set(network.batches) == {len(noise)}
    if name not in ("HeunEDMSampler", "DPMPP2SAncestralSampler"):
        assert len(network.batches) == 5


@pytest.mark.parametrize("name", VIDEO_SAMPLERS)
def test_guidance_of_weight_one_changes_nothing(name):
    """`scale=1` and a missing unconditional conditioning equal u + 1·(c − u)."""
    noise, cond, uncond = inputs(VIDEO)
    samples = []
    for arguments in ({"uc": uncond, "scale": 1}, {}, {"uc": uncond, "scale": torch.ones(2)}):
        network = CountingNetwork(video_network)
        torch.manual_seed(0)
        sampler = make_sampler(name, guider_config=VANILLA)
        samples.append(sampler(make_denoiser(name, network=network), noise, cond, **arguments))
        assert set(network.batches) == ({4} if isinstance(arguments.get("scale"), torch.Tensor) else {2})
    assert torch.equal(samples[0], samples[1])
    assert_close(samples[2], samples[0], 1e-5)


def test_scale_of_a_call_replaces_the_guiders():
    noise, cond, uncond = inputs(VIDEO)
    denoiser = make_denoiser("VideoDDIMSampler")
    sampler = make_sampler("VideoDDIMSampler", guider_config=VANILLA)
    other = make_sampler("VideoDDIMSampler", guider_config={**VANILLA, "params": {"scale": 3.0}})
    three = other(denoiser, noise, cond, uncond)
    assert torch.equal(sampler(denoiser, noise, cond, uncond, scale=3.0), three)
    each = sampler(denoiser, noise, cond, uncond, scale=torch.tensor([3.0, 6.0]))
    assert_close(each[:1], three[:1], 1e-5)
    assert_close(each[1:], sampler(denoiser, noise, cond, uncond)[1:], 1e-5)


@pytest.mark.parametrize(("name", "schedule"), EVERY_COMBINATION)
@pytest.mark.parametrize("num_steps", [1, 2, 1000])
def test_any_number_of_steps(name, schedule, num_steps):
    """One step up to every timestep works, and the call's number has priority."""
    network = CountingNetwork(video_network if name in VIDEO_SAMPLERS else sigma_network)
    x = seeded_input("noise", (2, 1, 1, 2, 2))
    cond = {"crossattn": seeded_input("cond", (2, 3, 4))}
    counted = []
    sample = make_sampler(name, schedule)(
        make_denoiser(name, schedule, network), x, cond, num_steps=num_steps, callback=lambda *c: counted.append(c)
    )
    assert sample.isfinite().all()
    assert counted == [(done, num_steps) for done in range(1, num_steps + 1)]
    if name in VIDEO_SAMPLERS and num_steps == 1000:
        assert network.timesteps == [[t, t] for t in range(999, -1, -1)]


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


@pytest.mark.parametrize("name", VIDEO_SAMPLERS + SIGMA_SAMPLERS)
def test_samples_depend_on_their_own_generator_alone(name):
    """Two samples with own generators equal single samples; the global one is unused."""
    schedule = "zerosnr" if name in VIDEO_SAMPLERS else "edm"
    sampler, denoiser = make_sampler(name, schedule, guider_config=VANILLA), make_denoiser(name, schedule)
    noise, cond, uncond = inputs(VIDEO)
    cond, uncond = cond["crossattn"], uncond["crossattn"]

    def sample(rows, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sampler(
            denoiser, noise[rows], {"crossattn": cond[rows]}, {"crossattn": uncond[rows]}, generator=generators
        )

    state = torch.get_rng_state()
    together = sample(slice(0, 2), [11, 12])
    assert_close(torch.cat([sample(slice(0, 1), [11]), sample(slice(1, 2), [12])]), together, 1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    if "SDE" in name or "Ancestral" in name:
        assert not torch.allclose(sample(slice(0, 2), [11, 13])[1], together[1])


def test_a_generator_draws_as_the_global_one_does():
    noise, cond, _ = inputs(VIDEO)
    sampler, denoiser = make_sampler("VPSDEDPMPP2MSampler"), make_denoiser("VPSDEDPMPP2MSampler")
    torch.manual_seed(3)
    by_global = sampler(denoiser, noise, cond)
    assert torch.equal(sampler(denoiser, noise, cond, generator=torch.Generator().manual_seed(3)), by_global)
    with pytest.raises(UserError, match="generator: 3 generators for a batch of 2"):
        sampler(denoiser, noise, cond, generator=[torch.Generator()] * 3)


def test_what_the_network_is_told():
    """`ofs` and `scale_emb` reach the whole doubled batch, `idx` is the timestep."""
    network = CountingNetwork(video_network)
    noise, cond, uncond = inputs(VIDEO)
    sampler = make_sampler("VPODEDPMPP2MSampler", guider_config=VANILLA)
    denoiser = make_denoiser("VPODEDPMPP2MSampler", network=network)
    sampler(denoiser, noise, cond, uncond, ofs=2.0, scale_emb=torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    seen = network.model_inputs[0]
    assert seen["ofs"].tolist() == [2.0] * 4
    assert seen["scale_emb"].tolist() == [[1.0, 2.0], [3.0, 4.0]] * 2
    assert seen["idx"].tolist() == network.timesteps[0] == [999] * 4 and seen["idx"].dtype == torch.long

    sampler(denoiser, noise, cond, uncond, ofs=torch.tensor([2.0]))
    assert network.model_inputs[-1]["ofs"].tolist() == [2.0] * 4 and "scale_emb" not in network.model_inputs[-1]


class NoTransfers(TorchDispatchMode):
    """Fails on an operation that brings a tensor from the accelerator to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        on_cuda = [arg for arg in tree_leaves(args) if isinstance(arg, torch.Tensor) and arg.device.type == "cuda"]
        if on_cuda and isinstance(output, torch.Tensor):
            assert output.device.type == "cuda", f"{func} brings its result to the host"
        return output


@pytest.mark.parametrize(("name", "schedule"), EVERY_COMBINATION)
@pytest.mark.parametrize("generator", [False, True])
def test_the_loop_never_waits_for_the_device(name, schedule, generator):
    """Tensors without values run through it, so that nothing reads a value."""
    dynamic = {"target": f"{MODULES}.guiders.DynamicCFG", "params": {"scale": 6, "exp": 5, "num_steps": 5}}
    sampler, denoiser = make_sampler(name, schedule, guider_config=dynamic), make_denoiser(name, schedule)
    generator = torch.Generator().manual_seed(0) if generator else None
    with FakeTensorMode(allow_non_fake_inputs=True), NoTransfers():
        x = torch.empty(2, 3, 4, 5, 6, device="cuda")
        cond = {"crossattn": torch.empty(2, 7, 8, device="cuda")}
        sample = sampler(denoiser, x, cond, cond, ofs=2.0, generator=generator)
    assert sample.device.type == "cuda" and sample.shape == x.shape


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


@pytest.mark.parametrize("name", ["VPSDEDPMPP2MSampler", "VideoDDIMSampler", "HeunEDMSampler"])
def test_guidance_in_an_interval_of_the_steps(name):
    """Outside of it only the conditional batch runs; the whole interval changes nothing."""
    schedule = "zerosnr" if name in VIDEO_SAMPLERS else "edm"

    def sample(interval=None, guider=VANILLA):
        network = CountingNetwork(video_network if name in VIDEO_SAMPLERS else sigma_network)
        torch.manual_seed(0)
        options = {} if interval is None else {"guidance_interval": interval}
        sampler = make_sampler(name, schedule, guider_config=guider, **options)
        return sampler(make_denoiser(name, schedule, network), *inputs(VIDEO)), network.batches

    everywhere, batches = sample()
    assert set(batches) == {4} and torch.equal(sample([0, 1])[0], everywhere)
    inside, batches = sample([0.2, 0.6])
    once = [2, 4, 4, 2, 2]
    assert batches == (once if name != "HeunEDMSampler" else [2, 2, 4, 4, 4, 4, 2, 2, 2])
    never = sample(guider={"target": f"{MODULES}.guiders.IdentityGuider"})[0]
    assert not torch.equal(inside, everywhere) and not torch.equal(inside, never)
    assert torch.equal(sample([0.9, 0.95])[0], never), "no step is in it"
    assert sample([0.8, 1.0])[1][-1] == 4


@pytest.mark.parametrize("interval", [[0.5], [0.6, 0.2], [0, 1.5]])
def test_an_interval_that_is_none(interval):
    with pytest.raises(UserError, match=r"guidance_interval: got .*expected two shares of the steps"):
        make_sampler("VideoDDIMSampler", guidance_interval=interval)


@pytest.mark.parametrize(("name", "schedule"), EVERY_COMBINATION)
def test_a_callback_sees_the_estimate_of_each_step_and_the_last_one_is_near_the_sample(name, schedule):
    """The network runs as often, and the callback gets the sampler's own tensor."""
    seen, plain, counts = [], [], []
    for callback in (lambda step, steps, denoised: seen.append(denoised), lambda step, steps: plain.append(step)):
        network = CountingNetwork(video_network if name in VIDEO_SAMPLERS else sigma_network)
        torch.manual_seed(0)
        sample = make_sampler(name, schedule)(make_denoiser(name, schedule, network), *inputs(VIDEO), callback=callback)
        counts.append(len(network.batches))
    assert counts[0] == counts[1] and plain == [1, 2, 3, 4, 5] and len(seen) == 5
    assert all(denoised.shape == sample.shape for denoised in seen)
    if name in (*VIDEO_SAMPLERS, "EulerEDMSampler"):
        assert_close(seen[-1], sample, 1e-4)


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
    with pytest.raises(UserError, match="num_steps is missing"):
        OwnEuler(SCHEDULES["edm"])(*arguments)


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


def test_progress_bar_only_when_verbose(capsys):
    noise, cond, _ = inputs(VIDEO)
    for verbose in (False, True):
        make_sampler("VideoDDIMSampler", verbose=verbose)(make_denoiser("VideoDDIMSampler"), noise, cond)
        assert ("5/5" in capsys.readouterr().err) is verbose


def test_sampler_mistakes():
    noise, cond, _ = inputs(VIDEO)
    denoiser = make_denoiser("VideoDDIMSampler")
    with pytest.raises(UserError, match="num_steps is missing"):
        make_sampler("VideoDDIMSampler", num_steps=None)(denoiser, noise, cond)
    with pytest.raises(UserError, match="num_steps: got 1001"):
        make_sampler("VideoDDIMSampler")(denoiser, noise, cond, num_steps=1001)
    with pytest.raises(UserError, match="fixed_frames: got -1; expected a whole number"):
        make_sampler("VideoDDIMSampler", fixed_frames=-1)
    with pytest.raises(UserError, match="EulerEDMSampler needs a schedule of sigma"):
        make_sampler("EulerEDMSampler")(denoiser, noise, cond)
    with pytest.raises(UserError, match=r"has \['crossattn'\]; .*conditional one, \['concat', 'crossattn'\]"):
        sampler = make_sampler("VideoDDIMSampler", guider_config=VANILLA)
        sampler(denoiser, noise, {**cond, "concat": noise}, cond)
