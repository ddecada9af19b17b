"""Sampling that starts from a clip, and sampling that goes on from frames."""

import math

import pytest
import torch

from sampler_cases import EVERY_COMBINATION, SIGMA_SAMPLERS, VIDEO, VIDEO_SAMPLERS, inputs, make_denoiser, make_sampler
from seeded import seeded_input
from sgm.errors import UserError
from sgm.modules.diffusionmodules.sampling_start import Start, steps_of_strength
from support import assert_close


def clip_like(noise):
    return 0.5 * seeded_input("clip", tuple(noise.shape))


@pytest.mark.parametrize(("name", "schedule"), EVERY_COMBINATION)
def test_strength_is_the_share_of_the_last_steps(name, schedule):
    """The loop begins at a·x0 + s·ε of its first step, and reports its progress from there."""
    noise, cond, _ = inputs(VIDEO)
    clip, told, seen = clip_like(noise), [], []
    sampler, denoiser = make_sampler(name, schedule, num_steps=10), make_denoiser(name, schedule)

    def watching(x, level, cond, **model_inputs):
        seen.append(x.clone())
        return denoiser(x, level, cond, **model_inputs)

    a, s, _ = sampler.schedule(10)
    sampler(watching, noise, cond, start=Start(clip, 0.4), callback=lambda *counts: told.append(counts))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert_close(seen[0], a[6] * clip + s[6] * noise, 1e-6)


@pytest.mark.parametrize(("name", "schedule"), EVERY_COMBINATION)
def test_strength_zero_gives_the_clip_without_a_step(name, schedule):
    noise, cond, _ = inputs(VIDEO)
    clip = clip_like(noise)
    sample = make_sampler(name, schedule)(lambda *_, **__: pytest.fail("a step"), noise, cond, start=Start(clip, 0.0))
    assert torch.equal(sample, clip)


@pytest.mark.parametrize("name", VIDEO_SAMPLERS)
def test_strength_one_is_noise_alone_where_the_schedule_ends_without_signal(name):
    noise, cond, uncond = inputs(VIDEO)
    sampler, denoiser = make_sampler(name, "zerosnr"), make_denoiser(name, "zerosnr")
    samples = []
    for start in (None, Start(), Start(clip_like(noise), 1.0)):
        torch.manual_seed(0)
        samples.append(sampler(denoiser, noise, cond, uncond, start=start))
    assert torch.equal(samples[0], samples[1]) and torch.equal(samples[0], samples[2])


@pytest.mark.parametrize(("name", "schedule"), EVERY_COMBINATION)
def test_a_clip_is_kept_where_the_network_knows_it(name, schedule):
    """A network whose estimate is the clip itself gives the clip, from whatever level."""
    noise, cond, _ = inputs(VIDEO)
    clip = clip_like(noise)
    sampler = make_sampler(name, schedule, num_steps=20)
    assert_close(sampler(lambda x, *_, **__: clip, noise, cond, start=Start(clip, 0.5)), clip, 1e-5)


@pytest.mark.parametrize("name", VIDEO_SAMPLERS + SIGMA_SAMPLERS)
@pytest.mark.parametrize("noised", [False, True])
def test_a_prefix_stands_in_every_call_of_the_network(name, noised):
    schedule = "zerosnr" if name in VIDEO_SAMPLERS else "edm"
    noise, cond, _ = inputs(VIDEO)
    prefix = clip_like(noise)[:, :2]
    options = {"sdedit": True} if noised and name in VIDEO_SAMPLERS else {}
    sampler, denoiser, fronts = make_sampler(name, schedule, num_steps=4, **options), make_denoiser(name, schedule), []

    def watching(x, level, cond, **model_inputs):
        fronts.append(x[:, :2].clone())
        return denoiser(x, level, cond, **model_inputs)

    sample = sampler(watching, noise, cond, start=Start(prefix=prefix))
    assert torch.equal(sample[:, :2], prefix)
    if not options:
        assert all(torch.equal(front, prefix) for front in fronts)
        return
    a, s, _ = sampler.schedule(4)
    for step, front in enumerate(fronts):
        drawn = (front - a[step] * prefix) / s[step]
        assert abs(drawn.std() - 1) < 0.2 and abs(drawn.mean()) < 0.2
    assert not torch.equal((fronts[0] - a[0] * prefix) / s[0], (fronts[1] - a[1] * prefix) / s[1])


@pytest.mark.parametrize("name", ["VPSDEDPMPP2MSampler", "VPODEDPMPP2MSampler", "VideoDDIMSampler"])
@pytest.mark.parametrize("sdedit", [False, True])
def test_fixed_frames_are_taken_from_the_noise_as_in_the_original(name, sdedit):
    """The original's loops set its frames before each step and after the last."""
    noise, cond, _ = inputs(VIDEO)
    prefix = clip_like(noise)[:, :2]
    given = torch.cat((prefix, noise[:, 2:]), dim=1)
    sampler, denoiser = make_sampler(name, num_steps=5, fixed_frames=2, sdedit=sdedit), make_denoiser(name)
    torch.manual_seed(1)
    sample = sampler(denoiser, given, cond)

    torch.manual_seed(1)
    a, s, timesteps = sampler.schedule(5)
    x, before = given, None
    for i in range(5):
        front = a[i] * prefix + s[i] * torch.randn_like(prefix) if sdedit else prefix
        x = torch.cat((front, x[:, 2:]), dim=1)
        told = {"idx": x.new_full((2,), timesteps[i], dtype=torch.long)}
        denoised = denoiser(x, x.new_full((2,), a[i]), cond, **told)
        if name == "VideoDDIMSampler":
            x = s[i + 1] / s[i] * x + (a[i + 1] - a[i] * s[i + 1] / s[i]) * denoised
            continue
        if s[i + 1] == 0:
            x = denoised
            continue
        h = (math.log(a[i + 1] / s[i + 1]) - math.log(a[i] / s[i])) if a[i] else math.inf
        estimate = denoised
        if before is not None:
            r = before[0] / h
            estimate = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * before[1]
        if "SDE" in name:
            eps = torch.randn_like(x)
            eps = torch.randn_like(x) if before is not None else eps
            x = s[i + 1] / s[i] * math.exp(-h) * x - math.expm1(-2 * h) * a[i + 1] * estimate
            x = x + s[i + 1] * math.sqrt(-math.expm1(-2 * h)) * eps
        else:
            x = s[i + 1] / s[i] * x - math.expm1(-h) * a[i + 1] * estimate
        before = h, denoised
    assert_close(sample[:, 2:], x[:, 2:], 1e-5)
    assert torch.equal(sample[:, :2], prefix)


def test_a_start_says_what_does_not_fit():
    for strength in (-0.1, 1.5, "half", math.nan, True):
        with pytest.raises(UserError, match=r"strength: got .*; expected a number from 0 to 1"):
            Start(strength=strength)
    assert [steps_of_strength(strength, 50) for strength in (0, 0.01, 0.58, 0.999, 1)] == [0, 0, 29, 49, 50]
