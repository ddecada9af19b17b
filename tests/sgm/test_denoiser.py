"""Scalings and weightings equal reference numbers; denoiser and wrapper their formulas."""

import math
import shutil

import pytest
import torch
from torch import nn

from seeded import seeded_input
from sgm.errors import UserError
from sgm.modules.diffusionmodules import denoiser_scaling, denoiser_weighting
from sgm.modules.diffusionmodules.denoiser import Denoiser, DiscreteDenoiser
from sgm.modules.diffusionmodules.discretizer import LegacyDDPMDiscretization, ZeroSNRDDPMDiscretization
from sgm.modules.diffusionmodules.util import timestep_embedding
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from support import Reference, assert_close

MODULES = "sgm.modules.diffusionmodules"
VALUES = Reference("sampling/scaling")
EPS_WEIGHTING = {"target": f"{MODULES}.denoiser_weighting.EpsWeighting"}
ZERO_SNR = {"target": f"{MODULES}.discretizer.ZeroSNRDDPMDiscretization", "params": {"shift_scale": 3.0}}
LEGACY = {"target": f"{MODULES}.discretizer.LegacyDDPMDiscretization"}


def scaling(name):
    return {"target": f"{MODULES}.denoiser_scaling.{name}"}


def recording_network(calls):
    def network(x, c_noise, cond, **model_inputs):
        calls.append((x, c_noise, cond, model_inputs))
        return x.sin()

    return network


@pytest.mark.parametrize("name", ["EDMScaling", "EpsScaling", "VScaling", "VScalingWithEDMcNoise", "VideoScaling"])
def test_scaling_gives_the_reference_numbers(name):
    instance = getattr(denoiser_scaling, name)()
    level = VALUES["alpha" if instance.takes_alpha else "sigma"]
    for i, scale in enumerate(instance(level, idx=torch.arange(1, 5))):
        assert_close(scale, VALUES[f"{name}.{i}"], 1e-6)
        assert scale.dtype == VALUES[f"{name}.{i}"].dtype


@pytest.mark.parametrize("name", ["UnitWeighting", "EDMWeighting", "VWeighting", "EpsWeighting"])
def test_weighting_gives_the_reference_numbers(name):
    assert_close(getattr(denoiser_weighting, name)()(VALUES["sigma"]), VALUES[name], 1e-6)


def test_denoiser_combines_input_and_network():
    """D = c_skip·x + c_out·network(c_in·x) per sample; extra inputs reach the network."""
    calls = []
    denoiser = Denoiser(EPS_WEIGHTING, scaling("EDMScaling"))
    x, sigma = seeded_input("x", (2, 3, 4, 4)), torch.tensor([0.3, 5.0])
    denoised = denoiser(recording_network(calls), x, sigma, {"vector": x}, ofs=7)
    for i, s in enumerate(sigma.tolist()):
        variance = s**2 + 0.25
        network_output = (x[i] / variance**0.5).sin()
        assert_close(denoised[i], 0.25 / variance * x[i] + 0.5 * s / variance**0.5 * network_output, 1e-6)
        assert math.isclose(calls[0][1][i], 0.25 * math.log(s), rel_tol=1e-6)
    assert calls[0][3] == {"ofs": 7}


def test_discrete_denoiser_snaps_to_its_table():
    """Levels become the nearest table value, and the network gets `idx` untouched."""
    calls = []
    denoiser = DiscreteDenoiser(EPS_WEIGHTING, scaling("VideoScaling"), 1000, ZERO_SNR, quantize_c_noise=True)
    table = ZeroSNRDDPMDiscretization(shift_scale=3.0)(1000, do_append_zero=False, flip=True)
    wanted = torch.tensor([0, 400, 999])
    x, idx = seeded_input("x", (3, 2, 4, 4, 4)), torch.tensor([5, 6, 7])
    denoised = denoiser(recording_network(calls), x, table[wanted] + 1e-5, {}, idx=idx)
    a = table[wanted].reshape(3, 1, 1, 1, 1)
    assert_close(denoised, a * x - (1 - a**2).sqrt() * x.sin(), 1e-6)
    assert torch.equal(calls[0][1], idx)


@pytest.mark.parametrize("quantize", [True, False])
def test_quantize_c_noise(quantize):
    """The network gets the index of the snapped σ, or without it the scaling's c_noise."""
    calls = []
    denoiser = DiscreteDenoiser(EPS_WEIGHTING, scaling("EpsScaling"), 1000, LEGACY, quantize_c_noise=quantize)
    table = LegacyDDPMDiscretization()(1000, do_append_zero=False, flip=True)
    denoiser(recording_network(calls), seeded_input("x", (2, 3, 4, 4)), table[[0, 700]] * 1.0001, {})
    assert calls[0][1].tolist() == ([0, 700] if quantize else table[[0, 700]].tolist())


@pytest.mark.parametrize("discretization", [LEGACY, {"target": f"{MODULES}.discretizer.EDMDiscretization"}])
def test_video_scaling_on_a_schedule_of_sigma(discretization):
    """The table is then a = 1/sqrt(1 + σ²), cleanest first."""
    denoiser = DiscreteDenoiser(EPS_WEIGHTING, scaling("VideoScaling"), 1000, discretization)
    assert (denoiser.levels.diff() <= 0).all()
    assert denoiser.levels.min() > 0 and denoiser.levels.max() < 1


def test_noise_levels_keep_their_digits_in_half_precision():
    denoiser = DiscreteDenoiser(EPS_WEIGHTING, scaling("VideoScaling"), 1000, ZERO_SNR)
    before = denoiser.levels.clone()
    assert torch.equal(denoiser.half().levels, before)
    assert not denoiser.state_dict()


def test_scaling_of_sigma_on_a_schedule_of_alpha_is_refused():
    with pytest.raises(UserError, match="EpsScaling needs a schedule of sigma"):
        DiscreteDenoiser(EPS_WEIGHTING, scaling("EpsScaling"), 1000, ZERO_SNR)


class RecordingNetwork(nn.Module):
    """A network that keeps its arguments."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, timesteps=None, context=None, y=None, **kwargs):
        self.seen = {"x": x, "timesteps": timesteps, "context": context, "y": y, **kwargs}
        return self.scale * x


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (2, 4, 5, 6)])
def test_wrapper_lays_out_the_arguments(shape):
    """Channels are concatenated, the network's dtype is used, and float32 is returned."""
    wrapper = OpenAIWrapper(RecordingNetwork()).to(torch.bfloat16)
    x, timesteps, context, vector = torch.randn(shape), torch.tensor([3, 999]), torch.randn(2, 7, 8), torch.randn(2, 5)
    cond = {"crossattn": context, "vector": vector, "concat": torch.ones(shape)}
    output = wrapper(x, timesteps, cond, ofs=1.5)
    seen = wrapper.diffusion_model.seen
    assert seen["x"].shape[-3] == 2 * shape[-3] and (seen["x"].narrow(-3, shape[-3], shape[-3]) == 1).all()
    assert torch.equal(seen["timesteps"], timesteps) and seen["ofs"] == 1.5
    assert torch.equal(seen["context"], context.bfloat16()) and torch.equal(seen["y"], vector.bfloat16())
    assert seen["x"].dtype == torch.bfloat16 and output.dtype == torch.float32
    assert cond["crossattn"] is context

    assert wrapper(x, timesteps, {}).shape == shape
    assert wrapper.diffusion_model.seen["context"] is None and wrapper.diffusion_model.seen["y"] is None


def test_wrapper_takes_an_explicit_dtype():
    wrapper = OpenAIWrapper(RecordingNetwork(), dtype=torch.float64)
    assert wrapper(torch.randn(1, 2, 3, 4), torch.zeros(1), {}).dtype == torch.float32
    assert wrapper.diffusion_model.seen["x"].dtype == torch.float64


def test_compiled_wrapper_keeps_names_and_numbers(monkeypatch):
    """Names in the state dict do not change, and the forward pass uses torch.compile."""
    compiled = []
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(nn.Module, "compile", lambda module, *args, **kwargs: compiled.append(module))
    wrapper = OpenAIWrapper(RecordingNetwork(), compile_model=True)
    assert compiled == [wrapper.diffusion_model]
    assert list(wrapper.state_dict()) == ["diffusion_model.scale"]


def test_timestep_embedding():
    """cos(t·ω) then sin(t·ω), ω falling geometrically from 1 towards 1/10000."""
    embedding = timestep_embedding(torch.tensor([0, 37]), 8)
    angles = [37 * 10000 ** (-i / 4) for i in range(4)]
    expected = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
    assert_close(embedding[1], torch.tensor(expected), 1e-6)
    assert embedding[0].tolist() == [1] * 4 + [0] * 4
    assert timestep_embedding(torch.tensor([1.5]), 7, dtype=torch.float16)[0, -1] == 0
    assert timestep_embedding(torch.tensor([1.5]), 7, dtype=torch.float16).dtype == torch.float16
