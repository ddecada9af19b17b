"""Test the map of adapters' names, in both directions, on networks of every family."""

import json
from pathlib import Path

import pytest

from cogvideox_sat.conversion.lora_names import (
    PROJECTIONS_OF,
    base_weight,
    parse_alpha_name,
    parse_diffusers_name,
    parse_sat_name,
)

MANIFESTS = Path(__file__).parents[1] / "reference" / "manifests"
EXAMPLES = {
    "query_key_value.matrix_A.0": "attn1.to_q.lora_A.weight",
    "query_key_value.matrix_A.1": "attn1.to_k.lora_A.weight",
    "query_key_value.matrix_A.2": "attn1.to_v.lora_A.weight",
    "query_key_value.matrix_B.1": "attn1.to_k.lora_B.weight",
    "dense.matrix_A.0": "attn1.to_out.0.lora_A.weight",
    "dense.matrix_B.0": "attn1.to_out.0.lora_B.weight",
}


@pytest.mark.parametrize(("sat", "theirs"), EXAMPLES.items())
def test_names_map_both_ways(sat, theirs):
    for layer in (0, 7, 41):
        ours, other = f"transformer.layers.{layer}.attention.{sat}", f"transformer.transformer_blocks.{layer}.{theirs}"
        key = parse_sat_name(ours)
        assert (key.diffusers_name, key.sat_name) == (other, ours)
        assert parse_diffusers_name(other) == key


@pytest.mark.parametrize(
    "name", ["cogvideox_2b", "cogvideox_5b", "cogvideox_5b_i2v", "cogvideox1.5_5b", "cogvideox1.5_5b_i2v"]
)
def test_the_weights_that_adapters_add_to_are_those_of_the_models(name):
    keys = json.loads((MANIFESTS / f"{name}.json").read_text())["keys"]
    names = {key.removeprefix("model.diffusion_model.") for key in keys}
    layers = 30 if name == "cogvideox_2b" else 42
    expected = {base_weight(layer, module) for layer in range(layers) for module in PROJECTIONS_OF}
    assert expected <= names
    assert base_weight(layers, "dense") not in names


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.3.attn1.to_out.0.lora_A.weight",
        "base_model.model.transformer_blocks.3.attn1.to_out.0.lora_A.default.weight",
        "base_model.model.transformer.transformer_blocks.3.attn1.to_out.0.lora_A.weight",
        "transformer.transformer_blocks.3.attn1.to_out.0.lora.down.weight",
        "diffusion_model.transformer_blocks.3.attn1.to_out.lora_down.weight",
    ],
)
def test_other_spellings(name):
    assert parse_diffusers_name(name).sat_name == "transformer.layers.3.attention.dense.matrix_A.0"


@pytest.mark.parametrize(
    "name",
    [
        "transformer.transformer_blocks.3.ff.net.0.proj.lora_A.weight",
        "transformer.transformer_blocks.3.attn1.to_q.lora_A.bias",
        "transformer.transformer_blocks.3.attn1.to_q.weight",
        "transformer.transformer_blocks.x.attn1.to_q.lora_A.weight",
        "transformer.transformer_blocks.3.attn1.to_q.alpha",
        "text_encoder.transformer_blocks.3.attn1.to_q.lora_A.weight",
    ],
)
def test_what_is_none_of_them(name):
    assert parse_diffusers_name(name) is None


def test_names_of_checkpoints_that_are_none_of_them():
    for name in ("query_key_value.matrix_A.3", "dense.matrix_A.1", "dense.weight", "query.matrix_A.0"):
        assert parse_sat_name(f"transformer.layers.0.attention.{name}") is None


def test_names_of_alphas():
    projection = parse_alpha_name("transformer.transformer_blocks.3.attn1.to_q.alpha")
    assert (projection.layer, projection.name) == (3, "to_q")
    assert parse_alpha_name("transformer.transformer_blocks.3.ff.net.0.proj.alpha") is None
