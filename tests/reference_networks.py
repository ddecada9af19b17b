"""Networks of the reference cases, with seeded weights, and their inputs."""

import torch
from torch import Tensor, nn

from seeded import seed_module_, seeded_input
from sgm.util import instantiate_from_config
from support import Reference

FAMILIES = ["t2v_2b", "t2v_5b", "i2v_5b", "t2v_15", "i2v_15"]


def network_and_inputs(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the network of the case `dit/{name}`, in evaluation mode, and its inputs."""
    case = Reference(f"dit/{name}").case
    network = seed_module_(instantiate_from_config(case["network_config"])).eval()
    b, t, _, h, w = case["latent"]
    inputs = {
        "x": seeded_input("x", (b, t, network.in_channels, h, w)),
        "timesteps": torch.tensor(case["timesteps"]),
        "context": seeded_input("context", case["context"]),
    }
    return network, inputs if case["ofs"] is None else {**inputs, "ofs": torch.tensor(case["ofs"])}
