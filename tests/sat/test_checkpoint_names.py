"""Every released family has its manifest's keys, shapes and parameter count."""

import json

import pytest
import torch

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.weights.checkpoint_files import NETWORK_PREFIX
from support import REFERENCE

FAMILIES = ["cogvideox_2b", "cogvideox_5b", "cogvideox_5b_i2v", "cogvideox1.5_5b", "cogvideox1.5_5b_i2v"]


def build(name: str) -> torch.nn.Module:
    config = load_configs([f"configs/{name}.yaml"])["model"]["network_config"]
    return instantiate_on_meta(config)


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(REFERENCE.parents[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_and_shapes_equal_the_manifest(name):
    manifest = json.loads((REFERENCE / "manifests" / f"{name}.json").read_text())
    network = build(name)
    shapes = {NETWORK_PREFIX + key: list(value.shape) for key, value in network.state_dict().items()}
    assert shapes == manifest["keys"]
    assert sum(parameter.numel() for parameter in network.parameters()) == manifest["parameters"]
    frozen = {"mixins.pos_embed.pos_embedding"}  # a table made with NumPy, of the 2B model
    assert all(parameter.is_meta for key, parameter in network.named_parameters() if key not in frozen)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_lora_twin_adds_three_pairs_to_qkv_and_one_to_dense(name):
    plain, lora = build(name), build(f"{name}_lora")
    rank = 256 if "i2v" in name else 128
    added = {key: value for key, value in lora.state_dict().items() if ".matrix_" in key}
    assert len(added) == plain.num_layers * 2 * (3 + 1)
    assert all(rank in value.shape for value in added.values())
    names = {key.replace(".original.", ".") for key in lora.state_dict().keys() - added.keys()}
    assert names == plain.state_dict().keys()
