"""Every tensor of the released models has exactly one place in diffusers, and back."""

import json
import re

import pytest
import torch

from cogvideox_sat.conversion.diffusers_configs import transformer_config, vae_config
from cogvideox_sat.conversion.model_sizes import released_config, sizes_of_config
from cogvideox_sat.conversion.released_models import CONFIGS
from cogvideox_sat.conversion.weight_family import detect_autoencoder, detect_network
from cogvideox_sat.weights.checkpoint_files import NETWORK_PREFIX
from cogvideox_sat.weights.diffusers_names import (
    TABLES,
    Piece,
    assemble,
    assembled_shape,
    check_divisible,
    from_diffusers,
    to_diffusers,
)
from sgm import diffusers_vae_names
from sgm.errors import UserError
from support import REFERENCE

Shapes = dict[str, tuple[int, ...]]


def manifest(name: str) -> Shapes:
    keys = json.loads((REFERENCE / "manifests" / f"{name}.json").read_text())["keys"]
    return {key.removeprefix(NETWORK_PREFIX): tuple(shape) for key, shape in keys.items()}


def diffusers_shapes(config: dict) -> Shapes:
    """Return the shapes of diffusers' network for a configuration."""
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", CONFIGS)
def test_network_at_full_size(family):
    """Names and shapes are diffusers' own one way, the manifest's the other way, tables aside."""
    ours = manifest(CONFIGS[family])
    detected = detect_network(ours, family)
    sizes = sizes_of_config(released_config(detected), detected, family)
    pieces = to_diffusers(ours)
    check_divisible(pieces, ours, family)
    theirs = {name: assembled_shape(parts, ours) for name, parts in pieces.items()}
    assert theirs == diffusers_shapes(transformer_config(detected, sizes))

    back = from_diffusers(theirs)
    check_divisible(back, theirs, family)
    shapes = {name: assembled_shape(parts, theirs) for name, parts in back.items()}
    assert shapes.items() <= ours.items()
    assert ours.keys() - shapes.keys() <= set(TABLES)


def test_every_row_goes_out_and_comes_back():
    """Two very narrow layers have different numbers in each row, which come back."""
    names = manifest(CONFIGS["5b_i2v"])
    ours = {name: shape for name, shape in names.items() if not re.search(r"\.([2-9]|\d\d)\.", name) or "embed" in name}
    weights, count = {}, 0
    for name, shape in ours.items():
        if ".layers." in name or "_list." in name or "modulations." in name or "pos_embedding" in name:
            rows = shape[0] if shape[0] % 12 else 12
            weights[name] = torch.arange(count, count + rows)[:, None]
            count += rows
        else:
            weights[name] = torch.arange(count, count + 1)
            count += 1
    theirs = {name: assemble(pieces, weights) for name, pieces in to_diffusers(weights).items()}
    assert sorted(torch.cat([t.flatten() for t in theirs.values()]).tolist()) == sorted(
        torch.cat([t.flatten() for name, t in weights.items() if name in from_diffusers(theirs)]).tolist()
    )
    for name, pieces in from_diffusers(theirs).items():
        assert torch.equal(assemble(pieces, theirs), weights[name]), name


def test_autoencoder_at_full_size():
    ours = manifest("vae")
    config = vae_config(detect_autoencoder(ours, "vae"), 0.7, is_15=False)
    names = diffusers_vae_names.to_diffusers(ours)
    assert {theirs: ours[name] for theirs, name in names.items()} == diffusers_shapes(config)
    back = diffusers_vae_names.from_diffusers(names)
    assert back.keys() == ours.keys() and all(names[theirs] == name for name, theirs in back.items())


def test_a_foreign_or_incomplete_set_of_names_is_refused():
    with pytest.raises(UserError, match=r"a.pt: 'lm_head.weight' is not a tensor"):
        to_diffusers(["lm_head.weight"], "a.pt")
    with pytest.raises(UserError, match=r"transformer: 'vision.weight' is not a tensor"):
        from_diffusers(["vision.weight"], "transformer")
    with pytest.raises(UserError, match=r"'transformer_blocks.0.attn1.to_v.weight' is missing"):
        from_diffusers([f"transformer_blocks.0.attn1.to_{part}.weight" for part in "qk"])
    name = "transformer.layers.0.attention.query_key_value.weight"
    with pytest.raises(UserError, match="does not divide into 3"):
        check_divisible(to_diffusers([name]), {name: (10, 4)}, "file")
    assert str(Piece("a", 1, 3)) == "a [2/3]" and str(Piece("a")) == "a"
