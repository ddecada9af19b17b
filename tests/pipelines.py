"""Pipelines of diffusers, converted from the tiny models."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import FAMILIES, TinyModels
from sgm.weights import module_weights, read_state_dict


@pytest.fixture(scope="session")
def pipelines(tiny: TinyModels, tmp_path_factory) -> Path:
    """Return a folder with a pipeline for each family, by name; do not change them."""
    folder = tmp_path_factory.mktemp("pipelines")
    for family in FAMILIES:
        convert(tiny, family, folder / family)
    return folder


def convert(tiny: TinyModels, family: str, output: Path, *flags: str) -> Path:
    from tools.convert_weight_sat2hf import main

    parts = ["--transformer_ckpt_path", tiny.folder / family, "--vae_ckpt_path", tiny.folder / "vae.pt"]
    parts += ["--text_encoder_cache_dir", tiny.folder / "t5", "--base", tiny.config(family), "--output_path", output]
    assert main([*map(str, parts), *flags]) == 0
    return output


def checkpoint(folder: Path) -> dict[str, Tensor]:
    """Return the content of the only iteration in a folder."""
    file = folder / (folder / "latest").read_text() / "mp_rank_00_model_states.pt"
    return module_weights(read_state_dict(file), what=str(file))


def assert_identical(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
