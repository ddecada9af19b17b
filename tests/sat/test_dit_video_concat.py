"""The network equals reference numbers: outputs and gradients of every family."""

import pytest
import torch

from dit_video_concat import DiffusionTransformer
from seeded import seed_module_, seeded_input
from sgm.util import instantiate_from_config
from support import Reference, assert_close

CASES = ["t2v_2b", "t2v_2b_wide", "t2v_2b_lora", "t2v_5b", "i2v_5b", "i2v_5b_lora", "t2v_15", "i2v_15"]


def build(case: dict) -> DiffusionTransformer:
    network = instantiate_from_config(case["network_config"])
    assert type(network) is DiffusionTransformer
    frozen = ("pos_embed.pos_embedding",) if case["kind"] == "2b" else ()
    return seed_module_(network, case["seed"], skip=frozen)


def inputs(name: str, case: dict) -> dict[str, torch.Tensor]:
    def draw(what: str, shape) -> torch.Tensor:
        return seeded_input(f"{name}.{what}", shape, case["seed"])

    x = draw("x", case["latent"])
    if case["concat_images"]:
        x = torch.cat((x, draw("concat", case["latent"])), dim=2)
    return {
        "x": x,
        "timesteps": torch.tensor(case["timesteps"]),
        "context": draw("context", case["context"]),
        "ofs": None if case["ofs"] is None else torch.tensor(case["ofs"]),
    }


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_match_the_reference(name):
    reference = Reference(f"dit/{name}")
    network = build(reference.case)
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == reference.case["keys"]

    output = network(**inputs(name, reference.case))
    assert_close(output, reference["output"], 2e-4)

    parameters = dict(network.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    output = network(**inputs(name, reference.case))
    (output * seeded_input(f"{name}.cotangent", output.shape, reference.case["seed"])).sum().backward()
    for key, expected in reference.tensors.items():
        if key.startswith("grad."):
            assert_close(parameters[key.removeprefix("grad.")].grad, expected, 1e-3)
