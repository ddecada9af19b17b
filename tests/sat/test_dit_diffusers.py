"""The network equals diffusers' CogVideoXTransformer3DModel for all five families."""

import pytest
import torch

from diffusers_network import diffusers_network, diffusers_rotary
from seeded import seed_module_, seeded_input
from sgm.util import instantiate_from_config
from support import Reference, assert_close


@pytest.mark.parametrize("name", ["t2v_2b", "t2v_5b", "i2v_5b", "t2v_15", "i2v_15"])
@torch.no_grad()
def test_network_equals_diffusers(name):
    case = Reference(f"dit/{name}").case
    params = case["network_config"]["params"]
    network = instantiate_from_config(case["network_config"])
    seed_module_(network, skip=("freqs_", *(["pos_embedding"] if case["kind"] == "2b" else [])))
    b, t, _, h, w = case["latent"]
    x = seeded_input("x", (b, t, params["in_channels"], h, w))
    context = seeded_input("context", case["context"])
    timesteps = torch.tensor(case["timesteps"])
    ofs = None if case["ofs"] is None else torch.tensor(case["ofs"])

    expected = diffusers_network(network, params)(
        hidden_states=x,
        encoder_hidden_states=context,
        timestep=timesteps,
        ofs=ofs,
        image_rotary_emb=diffusers_rotary(params, network.patch_grid(x)),
        return_dict=False,
    )[0]
    assert_close(network(x, timesteps, context, ofs=ofs), expected, 2e-4)
