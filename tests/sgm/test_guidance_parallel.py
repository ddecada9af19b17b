"""Two processes with half of guidance each equal one process, to the bit."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distributed import run_distributed
from seeded import seeded_input
from sgm.errors import UserError
from sgm.modules.diffusionmodules.guidance_parallel import GuidanceParallel
from sgm.modules.diffusionmodules.guiders import IdentityGuider
from sgm.util import instantiate_from_config

MODULES = "sgm.modules.diffusionmodules"
GUIDERS = {
    "vanilla": {"target": f"{MODULES}.guiders.VanillaCFG", "params": {"scale": 6}},
    "dynamic": {"target": f"{MODULES}.guiders.DynamicCFG", "params": {"scale": 6, "exp": 5, "num_steps": 5}},
}
DISCRETIZATION = {"target": f"{MODULES}.discretizer.ZeroSNRDDPMDiscretization", "params": {"shift_scale": 1.0}}
SAMPLERS = ["VideoDDIMSampler", "VPSDEDPMPP2MSampler", "VPODEDPMPP2MSampler"]


def denoiser(x: Tensor, level: Tensor, cond: dict[str, Tensor], **_: Any) -> Tensor:
    """Return a network's stand-in, each of whose samples depends on itself alone."""
    return torch.stack([torch.tanh(a * c.mean()) for a, c in zip(x, cond["crossattn"], strict=True)])


def sampled(name: str, guider: str, group: dist.ProcessGroup | None, **options: Any) -> Tensor:
    params = {"discretization_config": DISCRETIZATION, "num_steps": 5, "guider_config": GUIDERS[guider]}
    sampler = instantiate_from_config({"target": f"{MODULES}.sampling.{name}", "params": params})
    if group is not None:
        sampler.guider = GuidanceParallel(sampler.guider, group)
    torch.manual_seed(3)
    cond, uncond = ({"crossattn": seeded_input(each, (2, 4, 8))} for each in ("cond", "uncond"))
    return sampler(denoiser, seeded_input("x", (2, 3, 4, 2, 2)), cond, uc=uncond, **options)


CASES = [(name, guider, {}) for name in SAMPLERS for guider in GUIDERS]
CASES += [(SAMPLERS[0], "vanilla", {"scale": 1}), (SAMPLERS[0], "vanilla", {"scale": 3.0})]


def samples_of_a_rank() -> tuple[list[Tensor], str]:
    world = dist.group.WORLD
    results = [sampled(name, guider, world, **options) for name, guider, options in CASES]
    wrapped = GuidanceParallel(IdentityGuider(), world)
    try:
        wrapped.prepare_inputs(torch.ones(2, 1), torch.ones(2), {"a": torch.ones(2)}, None)
    except UserError as error:
        return results, str(error)
    return results, ""


@pytest.mark.distributed
@pytest.mark.slow
def test_every_sampler_comes_to_the_same():
    outcomes = run_distributed(samples_of_a_rank, 2)
    for number, (name, guider, options) in enumerate(CASES):
        expected = sampled(name, guider, None, **options)
        for results, refused in outcomes:
            assert torch.equal(results[number], expected), (name, guider)
            assert "IdentityGuider runs the network on 2 samples for 2, not on two halves" in refused
