"""Adapter, exported file in diffusers and merged checkpoint sample the same latents.

Nobody is told a scale: alpha and rank come with the checkpoint, and then with the exported file.
"""

from pathlib import Path

import pytest
import torch
import yaml

from long_cases import others_long
from lora_adapters import save, with_lora
from pipelines import FAMILIES, pipelines  # noqa: F401
from sampling_pairs import DDIM, DPM, model_config, our_latents, their_latents
from support import assert_close, relative_error
from tools.export_sat_lora_weight import main as export
from tools.merge_lora import main as merge

pytestmark = pytest.mark.slow

WIDTH, LAYERS = 256, 2  # of the tiny models
RANK, ALPHA = 4, 3
TOLERANCE = 1e-4


def write_adapter(folder: Path, config: dict) -> None:
    """Write an adapter like a training run: the matrices, and its configuration."""
    generator, adapter = torch.Generator().manual_seed(0), {}
    for layer in range(LAYERS):
        for module, parts in (("query_key_value", 3), ("dense", 1)):
            name = f"transformer.layers.{layer}.attention.{module}.matrix"
            for part in range(parts):
                adapter[f"{name}_A.{part}"] = torch.randn(RANK, WIDTH, generator=generator) / WIDTH**0.5
                adapter[f"{name}_B.{part}"] = torch.randn(WIDTH, RANK, generator=generator) / RANK**0.5
    save(adapter, folder, "10")
    (folder / "training_config.yaml").write_text(yaml.safe_dump({"model": config}))


@pytest.mark.parametrize("family", others_long("5b_i2v", "2b", "5b", "1.5", "1.5_i2v"))
def test_a_full_run(tiny, pipelines, tmp_path, family):  # noqa: F811
    run = (DPM if family in ("5b", "1.5_i2v") else DDIM, 5)
    plain, base, adapter = model_config(tiny.config(family)), tiny.folder / family, tmp_path / "run"
    adapted = {**plain, "network_config": with_lora(plain["network_config"], RANK, ALPHA)}
    write_adapter(adapter, adapted)
    command = ["--sat_pt_path", adapter, "--lora_save_directory", tmp_path / "exported"]
    assert export(list(map(str, command))) == 0
    command = ["--load", base, "--lora", adapter, "--output", tmp_path / "merged"]
    assert merge(list(map(str, command))) == 0

    ours = our_latents(adapted, run, base, adapter)
    assert relative_error(our_latents(plain, run, base), ours) > 0.01  # the adapter matters
    assert_close(our_latents(plain, run, tmp_path / "merged"), ours, TOLERANCE)
    assert_close(their_latents(pipelines / family, run, tmp_path / "exported"), ours, TOLERANCE)
