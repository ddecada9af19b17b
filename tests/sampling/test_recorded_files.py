"""The hashes in a record are of the right files, in every form that weights come in."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from cogvideox_sat.configuration.argument_lists import SamplingArguments
from cogvideox_sat.sampling.recorded_files import network_files, text_encoder_files, vae_files, weight_files


def sharded(folder: Path) -> set[Path]:
    """Write an index and two shards, beside a file that does not belong to them."""
    folder.mkdir(parents=True)
    names = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    for name in [*names, "other.safetensors"]:
        save_file({name: torch.zeros(1)}, folder / name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: name for name in names}}))
    return {index, *(folder / name for name in names)}


def test_a_network_in_shards(tmp_path):
    expected = sharded(tmp_path / "transformer")
    assert set(network_files(str(tmp_path / "transformer"))) == expected
    (tmp_path / "model_index.json").write_text("{}")
    assert set(network_files(str(tmp_path))) == expected, "a pipeline's"


def test_a_network_of_a_training_run(tmp_path):
    """The hash is that of all model-parallel shares of `latest`, without optimizer states."""
    for iteration in ("1", "2"):
        (tmp_path / iteration / "training_state").mkdir(parents=True)
        for rank in range(2):
            (tmp_path / iteration / f"mp_rank_0{rank}_model_states.pt").touch()
        (tmp_path / iteration / "training_state" / "large.pt").touch()
    (tmp_path / "latest").write_text("2")
    expected = [tmp_path / "2" / f"mp_rank_0{rank}_model_states.pt" for rank in range(2)]
    assert network_files(str(tmp_path)) == expected
    assert network_files(str(tmp_path / "gone")) == []


def test_a_vae(tmp_path):
    (tmp_path / "vae.pt").touch()
    assert vae_files(tmp_path / "vae.pt") == [tmp_path / "vae.pt"]
    assert set(vae_files(tmp_path / "pipeline" / "vae")) == set()
    expected = sharded(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert set(vae_files(tmp_path / "pipeline")) == set(vae_files(tmp_path / "pipeline" / "vae")) == expected


def test_a_text_encoder(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin", "config.json", "spiece.model", "README.md"):
        (tmp_path / name).touch()
    names = [path.name for path in text_encoder_files(tmp_path)]
    assert names == ["model.safetensors", "config.json", "spiece.model"]
    (tmp_path / "model.safetensors").unlink()
    assert text_encoder_files(tmp_path)[0].name == "pytorch_model.bin"


def test_what_is_not_here_has_no_files(tmp_path):
    model = {
        "conditioner_config": {"params": {"emb_models": [{"params": {"model_dir": "google/t5-v1_1-xxl"}}]}},
        "first_stage_config": {"params": {"ckpt_path": "/nowhere/vae.pt"}},
    }
    files = weight_files(SamplingArguments(load="/nowhere", lora_load="/nowhere", model_config=model))
    assert files == {"vae": [], "adapter": [], "checkpoint": [], "text_encoder": []}
