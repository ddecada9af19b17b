"""Test that tensors determine their family, at any depth and width."""

import json
import re
from dataclasses import replace

import pytest
import torch

from cogvideox_sat.conversion.model_sizes import (
    combined,
    computed_tables,
    released_config,
    sizes_of_config,
    sizes_of_tables,
)
from cogvideox_sat.conversion.released_models import CONFIGS
from cogvideox_sat.conversion.weight_family import (
    autoencoder_shapes,
    detect_autoencoder,
    detect_network,
    network_shapes,
    table_shapes,
)
from cogvideox_sat.weights.checkpoint_files import NETWORK_PREFIX
from cogvideox_sat.weights.diffusers_names import FREQUENCIES, POSITION_TABLE, TABLES, UNUSED_TABLE
from sgm.errors import UserError
from support import REFERENCE


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    keys = json.loads((REFERENCE / "manifests" / f"{name}.json").read_text())["keys"]
    return {key.removeprefix(NETWORK_PREFIX): tuple(shape) for key, shape in keys.items()}


def small(family: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network of that family with another depth and width."""
    detected = detect_network(manifest(CONFIGS[family]), family)
    changed = replace(detected, num_layers=3, hidden_size=256, num_attention_heads=4, time_embed_dim=128)
    shapes = network_shapes(changed)
    return shapes | table_shapes(changed, (5, 8, 12), 64)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_released_models(family):
    shapes = manifest(CONFIGS[family])
    detected = detect_network(shapes, family)
    assert detected.name == family
    params = released_config(detected)["model"]["network_config"]["params"]
    assert detected.parameters() == {name: params.get(name) for name in detected.parameters()}
    sizes = sizes_of_config(released_config(detected), detected, family)
    tables = table_shapes(detected, sizes.grid(detected.patch), sizes.text_length)
    assert network_shapes(detected) | tables == shapes


IMPOSSIBLE = [(), (0,), (3,), (0, 0), (0, 16, 2, 2), (256, 16, 0, 2), (256, 0, 2, 2), (5, 5, 5, 5, 5)]


@pytest.mark.parametrize("family", CONFIGS)
def test_impossible_shapes_are_refused_by_one_kind_of_error(family):
    shapes = small(family)
    for name in (name for name in shapes if name not in TABLES and ".1." not in name):
        for shape in IMPOSSIBLE:
            with pytest.raises(UserError):
                detect_network({**shapes, name: shape}, "small")


def test_impossible_shapes_of_an_autoencoder_are_refused_by_one_kind_of_error():
    shapes = manifest("vae")
    for name in (name for name in shapes if name.endswith((".block.0.conv1.conv.weight", "conv_in.conv.weight"))):
        for shape in IMPOSSIBLE:
            with pytest.raises(UserError):
                detect_autoencoder({**shapes, name: shape}, "vae")


@pytest.mark.parametrize("family", CONFIGS)
def test_other_depths_and_widths(family):
    detected = detect_network(small(family), "small")
    assert (detected.name, detected.num_layers, detected.hidden_size, detected.head_dim) == (family, 3, 256, 64)


def test_the_autoencoder():
    shapes = manifest("vae")
    detected = detect_autoencoder(shapes, "vae")
    assert (detected.widths, detected.num_res_blocks, detected.z_channels) == ((128, 256, 256, 512), 3, 16)
    assert autoencoder_shapes(detected) == shapes
    with pytest.raises(UserError, match=r"lacks decoder.up.1.upsample.conv.weight"):
        detect_autoencoder(
            {name: s for name, s in shapes.items() if name != "decoder.up.1.upsample.conv.weight"}, "vae"
        )
    fewer = {name: s for name, s in shapes.items() if not re.match(r"decoder\.up\.\d\.block\.3\.", name)}
    with pytest.raises(
        UserError, match=r"channels and 3 blocks, the levels of its encoder \[128, 256, 256, 512\] and 3"
    ):
        detect_autoencoder(fewer, "vae")
    with pytest.raises(UserError, match="not a CogVideoX autoencoder"):
        detect_autoencoder({"encoder.weight": (3, 3)}, "vae")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.layers.1.mlp.dense_h_to_4h.bias": None}, "lacks transformer.layers.1.mlp.dense_h_to_4h.bias"),
        ({"transformer.layers.1.mlp.dense_h_to_4h.bias": (7,)}, r"dense_h_to_4h.bias \[7\] instead of \[1024\]"),
        ({"transformer.layers.0.gate": (4,)}, "has transformer.layers.0.gate, which such a model does not"),
        ({"time_embed.0.weight": None}, "is not a CogVideoX network: it has no time_embed.0.weight"),
        ({"mixins.patch_embed.proj.weight": (256, 24, 2, 2)}, "it has 24 input and 16 output channels"),
        (
            {"mixins.patch_embed.proj.weight": (256, 32, 2, 2)},
            "of no known family: 1.0, image-to-video, with rotary pos",
        ),
        ({"ofs_embed.0.weight": (128, 128)}, "with rotary positions, with ofs"),
        ({"mixins.patch_embed.proj.weight": (256, 3)}, "is of no known family"),
    ],
)
def test_other_sets_of_tensors_are_refused(change, message):
    shapes = {name: shape for name, shape in (small("5b") | change).items() if shape is not None}
    with pytest.raises(UserError, match=message):
        detect_network(shapes, "file")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("2b", torch.float16), ("5b", torch.bfloat16), ("5b_i2v", torch.float32), ("1.5", torch.bfloat16)],
)
def test_tables_tell_the_size_of_the_largest_clip(family, dtype):
    """The tables have full size, and are rounded as they are stored."""
    detected = detect_network(manifest(CONFIGS[family]), family)
    sizes = sizes_of_config(released_config(detected), detected, family)
    if family == "2b":  # narrower, since computing a wide table takes long
        detected = replace(detected, hidden_size=128, num_attention_heads=2)
    tables = computed_tables(detected, sizes, dtype)
    assert (tables.get(UNUSED_TABLE) is None) == (family == "2b") and (FREQUENCIES[0] in tables) == family.startswith(
        "5"
    )
    if family == "5b_i2v":
        tables[POSITION_TABLE] = torch.empty(1, 226 + 17550, 8)
    found = sizes_of_tables(tables, detected, family)
    assert combined(sizes, found, "itself") == sizes
    assert len(found) == {"2b": 5, "5b": 3, "5b_i2v": 4, "1.5": 0}[family]


def test_tables_of_other_sizes_are_found_and_wrong_ones_refused():
    detected = replace(detect_network(small("2b"), "small"), hidden_size=96)
    released = sizes_of_config(
        released_config(detect_network(manifest("cogvideox_2b"), "")), detect_network(manifest("cogvideox_2b"), ""), ""
    )
    sizes = replace(released, num_frames=9, latent_height=10, latent_width=14, text_length=5, interpolation=1.25)
    table = computed_tables(detected, sizes, torch.float16)[POSITION_TABLE]
    found = sizes_of_tables({POSITION_TABLE: table}, detected, "file")
    assert combined(released, found, None) == sizes
    with pytest.raises(UserError, match=r"config.yaml is of another model: it has num_frames 49, the weights have 9"):
        combined(released, found, "config.yaml")
    table[0, 40] += 0.1
    with pytest.raises(UserError, match="not the sin-cos one"):
        sizes_of_tables({POSITION_TABLE: table}, detected, "file")
    rotary = detect_network(small("5b"), "small")
    tables = computed_tables(rotary, sizes, torch.float32)
    tables[FREQUENCIES[0]][7] *= -1
    with pytest.raises(UserError, match="not that of any grid"):
        sizes_of_tables(tables, rotary, "file")


@pytest.mark.parametrize("shape", [(0, 64), (5,), (4, 8), (2, 4, 64)])
def test_tables_of_impossible_shapes_are_named(shape):
    rotary, added = (replace(detect_network(small(name), "small"), hidden_size=96) for name in ("5b", "2b"))
    for table in FREQUENCIES:
        tables = dict.fromkeys(FREQUENCIES, torch.zeros(7, rotary.head_dim)) | {table: torch.zeros(shape)}
        with pytest.raises(UserError, match=rf"file: {table} has the shape .*; expected \[n, {rotary.head_dim}\]"):
            sizes_of_tables(tables, rotary, "file")
    with pytest.raises(UserError, match=r"pos_embedding has the shape .*; expected \[1, n, 96\]"):
        sizes_of_tables({POSITION_TABLE: torch.zeros(shape)}, added, "file")


def test_a_configuration_of_another_model_is_refused():
    detected = detect_network(small("5b"), "small")
    with pytest.raises(UserError, match="it has num_layers 42, the weights have 3"):
        sizes_of_config(released_config(detected), detected, "cogvideox_5b.yaml")
    with pytest.raises(UserError, match=r"sft.yaml does not describe a model: 'model' is missing; give a model's file"):
        sizes_of_config({"args": {}}, detected, "sft.yaml")
    endless = released_config(detected)
    endless["model"]["network_config"]["params"]["num_frames"] = float("inf")
    with pytest.raises(UserError, match=r"a.yaml does not describe a model: cannot convert float infinity"):
        sizes_of_config(endless, detected, "a.yaml")
