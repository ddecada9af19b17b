"""Samplers around their loop: guidance, noise, the network's inputs, callbacks."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sampler_cases import (
    EVERY_COMBINATION,
    MODULES,
    SIGMA_SAMPLERS,
    VANILLA,
    VIDEO,
    VIDEO_SAMPLERS,
    CountingNetwork,
    inputs,
    make_denoiser,
    make_sampler,
    sigma_network,
    video_network,
)
from seeded import seeded_input
from sgm.errors import UserError
from sgm.modules.diffusionmodules.sampler import checked_interval
from support import assert_close


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
@pytest.mark.slow
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
@pytest.mark.slow
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


def test_an_interval_may_be_a_list_or_a_tuple():
    assert checked_interval([0, 1]) == checked_interval((0, 1)) == (0, 1)


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


def test_progress_bar_only_when_verbose(capsys):
    noise, cond, _ = inputs(VIDEO)
    for verbose in (False, True):
        make_sampler("VideoDDIMSampler", verbose=verbose)(make_denoiser("VideoDDIMSampler"), noise, cond)
        assert ("5/5" in capsys.readouterr().err) is verbose


def test_sampler_mistakes():
    noise, cond, _ = inputs(VIDEO)
    denoiser = make_denoiser("VideoDDIMSampler")
    with pytest.raises(UserError, match="num_steps: missing"):
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
