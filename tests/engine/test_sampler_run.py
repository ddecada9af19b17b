"""A sampler gets what it takes, and calls the network once for each step."""

from functools import partial

import pytest
import torch

from cogvideox_sat.engine.sampler_run import SamplerRun, agreed_start
from cogvideox_sat.parallel.video_groups import ALONE
from sgm.errors import UserError
from sgm.modules.diffusionmodules.sampling_start import NOISE, Start

NOISE_OF_TWO = torch.ones(2, 3, 4, 2, 2)


def denoiser(network, x, level, c, **inputs):
    return network(x, level, c, **inputs)


class TakesEverything:
    """Two steps, the second at level 0.5."""

    num_steps = 2

    def __call__(self, denoise, x, cond, uc=None, num_steps=None, ofs=None, callback=None, start=NOISE):
        self.start = start
        for step, level in enumerate((1.0, 0.5)):
            x = denoise(x, x.new_full((len(x),), level), cond, ofs=ofs)
            if callback is not None:
                callback(step + 1, 2, denoised=x)
        return x


class TakesNothing:
    def __call__(self, denoise, x, cond, uc=None, num_steps=None):
        return denoise(x, x.new_ones(len(x)), cond)


def made(sampler, start=NOISE, ofs=None, callback=None, batch=None, check=None) -> SamplerRun:
    return SamplerRun(
        *(sampler, denoiser, ALONE),
        **{"cond": {}, "uc": None, "start": start, "num_steps": None},
        **{"ofs": ofs, "callback": callback, "batch": batch, "check": check},
    )


class Network:
    def __init__(self):
        self.calls = []

    def __call__(self, x, t, c, ofs=None):
        self.calls.append((len(x), t[0].item(), ofs))
        return x / 2


def test_steps_are_counted_and_reported():
    told, network = [], Network()
    run = made(TakesEverything(), callback=lambda done, steps, denoised=None: told.append((done, steps, denoised)))
    assert (run.progress.steps, run.progress.step) == (2, 0)
    latents = run(network, NOISE_OF_TWO)
    assert torch.equal(latents, NOISE_OF_TWO / 4)
    assert [(done, steps) for done, steps, _ in told] == [(1, 2), (2, 2)] and told[-1][2] is latents
    assert run.progress.step == 2
    counts = []
    made(TakesEverything(), callback=lambda done, steps: counts.append(done))(network, NOISE_OF_TWO)
    assert counts == [1, 2]


def test_a_sampler_that_takes_less():
    """The network gets `ofs` all the same; nothing is known about the steps."""
    ofs, network = torch.full((2,), 2.0), Network()
    run = made(TakesNothing(), ofs=ofs, callback=lambda *_: None)
    run(network, NOISE_OF_TWO)
    assert network.calls == [(2, 1.0, ofs)] and (run.progress.step, run.progress.steps) == (None, None)
    with pytest.raises(UserError, match="video: TakesNothing takes no `start`"):
        made(TakesNothing(), start=Start(NOISE_OF_TWO))


def test_samples_one_at_a_time():
    network = Network()
    assert torch.equal(made(TakesEverything(), batch=1)(network, NOISE_OF_TWO), NOISE_OF_TWO / 4)
    assert [call[:2] for call in network.calls] == [(1, 1.0)] * 2 + [(1, 0.5)] * 2


def test_the_levels_of_a_run_are_known_before_it():
    """The clip of the start is as small as the noise; no random number is lost."""
    sampler, ofs = TakesEverything(), torch.full((2,), 2.0)
    run = made(sampler, start=Start(NOISE_OF_TWO, 0.5, NOISE_OF_TWO[:, :1]), ofs=ofs, callback=pytest.fail)
    state = torch.get_rng_state()
    levels = run.asked_levels(NOISE_OF_TWO)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(level.timesteps.tolist(), level.ofs is ofs) for level in levels] == [([1.0] * 2, True), ([0.5] * 2, True)]
    assert not hasattr(sampler, "start"), "a copy of the sampler runs"


def test_each_output_is_checked():
    def refuse(output):
        raise UserError("not finite")

    network = Network()
    with pytest.raises(UserError, match="not finite"):
        made(TakesEverything(), check=refuse)(network, NOISE_OF_TWO)
    assert len(network.calls) == 1


def test_starts_that_do_not_fit():
    settle = partial(agreed_start, shape=(2, 3, 4, 2, 2), device=torch.device("cpu"), groups=ALONE)
    start = settle(Start(NOISE_OF_TWO.double(), 0.5, NOISE_OF_TWO[:, :1].half()))
    assert (start.clip.dtype, start.prefix.dtype, start.strength) == (torch.float32, torch.float32, 0.5)
    with pytest.raises(UserError, match="video: latents of shape"):
        settle(Start(NOISE_OF_TWO[:1]))
    for prefix in (NOISE_OF_TWO, NOISE_OF_TWO[:1, :1], NOISE_OF_TWO[:, :1, :3]):
        with pytest.raises(UserError, match="prefix: latents of shape"):
            settle(Start(prefix=prefix))
