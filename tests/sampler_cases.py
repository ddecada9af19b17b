"""Samplers and denoisers with small networks, of every kind, and their references."""

import torch

from seeded import seeded_input
from sgm.util import instantiate_from_config
from support import Reference

MODULES = "sgm.modules.diffusionmodules"
VIDEO = Reference("sampling/video_samplers")
SIGMA = Reference("sampling/sigma_samplers")


def video_network(x, t, cond, **model_inputs):
    rest = (slice(None),) + (None,) * (x.ndim - 1)
    return x.tanh() * torch.cos(t / 300)[rest] + 0.3 * cond["crossattn"].mean(dim=(1, 2))[rest]


def sigma_network(x, t, cond, **model_inputs):
    rest = (slice(None),) + (None,) * (x.ndim - 1)
    return x.tanh() / (1 + t)[rest] + 0.3 * cond["crossattn"].mean(dim=(1, 2))[rest]


def video_denoiser(discretization_config, network=video_network):
    denoiser = instantiate_from_config(
        {
            "target": f"{MODULES}.denoiser.DiscreteDenoiser",
            "params": {
                "num_idx": 1000,
                "quantize_c_noise": False,
                "weighting_config": {"target": f"{MODULES}.denoiser_weighting.EpsWeighting"},
                "scaling_config": {"target": f"{MODULES}.denoiser_scaling.VideoScaling"},
                "discretization_config": discretization_config,
            },
        }
    )
    return lambda x, alpha, cond, **model_inputs: denoiser(network, x, alpha, cond, **model_inputs)


def sigma_denoiser(network=sigma_network):
    denoiser = instantiate_from_config(
        {
            "target": f"{MODULES}.denoiser.Denoiser",
            "params": {
                "weighting_config": {"target": f"{MODULES}.denoiser_weighting.EDMWeighting"},
                "scaling_config": {"target": f"{MODULES}.denoiser_scaling.EDMScaling"},
            },
        }
    )
    return lambda x, sigma, cond, **model_inputs: denoiser(network, x, sigma, cond, **model_inputs)


def inputs(reference):
    seed = reference.case["seed"]
    noise = seeded_input("noise", reference.case["shape"], seed)
    cond = {"crossattn": seeded_input("cond", (2, 7, 8), seed)}
    uncond = {"crossattn": seeded_input("uncond", (2, 7, 8), seed)}
    return noise, cond, uncond


VIDEO_SAMPLERS = ["VPSDEDPMPP2MSampler", "VPODEDPMPP2MSampler", "VideoDDIMSampler", "VideoDDPMSampler"]
SIGMA_SAMPLERS = sorted({"DDIMSampler", *(name.split(".")[0] for name in SIGMA.case["cases"])})
NOISELESS = ["VPODEDPMPP2MSampler", "VideoDDIMSampler", "EulerEDMSampler", "HeunEDMSampler", "DPMPP2MSampler"]
SCHEDULES = {
    "zerosnr": {"target": f"{MODULES}.discretizer.ZeroSNRDDPMDiscretization", "params": {"shift_scale": 3.0}},
    "legacy": {"target": f"{MODULES}.discretizer.LegacyDDPMDiscretization"},
    "edm": {"target": f"{MODULES}.discretizer.EDMDiscretization"},
}
VANILLA = {"target": f"{MODULES}.guiders.VanillaCFG", "params": {"scale": 6.0}}
EVERY_COMBINATION = [(name, schedule) for name in VIDEO_SAMPLERS for schedule in SCHEDULES] + [
    (name, schedule) for name in SIGMA_SAMPLERS for schedule in ("legacy", "edm")
]


def make_sampler(name, schedule="zerosnr", **params):
    config = {"discretization_config": SCHEDULES[schedule], "num_steps": 5, **params}
    return instantiate_from_config({"target": f"{MODULES}.sampling.{name}", "params": config})


def make_denoiser(name, schedule="zerosnr", network=None):
    if name in VIDEO_SAMPLERS:
        return video_denoiser(SCHEDULES[schedule], network or video_network)
    return sigma_denoiser(network or sigma_network)


class CountingNetwork:
    """Passes calls on, keeping the batch sizes, the timesteps and the other inputs."""

    def __init__(self, network):
        self.network, self.batches, self.timesteps, self.model_inputs = network, [], [], []

    def __call__(self, x, t, cond, **model_inputs):
        self.batches.append(len(x))
        self.timesteps.append(t.tolist())
        self.model_inputs.append(model_inputs)
        return self.network(x, t, cond, **model_inputs)
