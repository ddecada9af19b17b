"""Tools name the file and the key of a wrong value, as the commands do."""

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tools import decode_latents, evaluate_vae, precompute_latents, whiten_latents
from training_clips import write_dataset
from training_runs import ROOT

CONFIGS = ROOT / "configs"
VAE = str(ROOT / "assets" / "tiny" / "vae.safetensors")
DECODER = {"first_stage_config": {"params": {"decoder_config": {"params": {"ch": "wide"}}}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    write_dataset(folder / "data", clips=1, frames=9, sizes=[(64, 64)])
    for name, content in {
        "data": {"data": {"params": {"video_size": [64]}}},
        "params": {"data": {"params": -1}},
        "frames": {"data": {"params": {"max_num_frames": "cpu"}}},
        "model": {"model": DECODER},
        "huge": {"model": {"first_stage_config": {"params": {"decoder_config": {"params": {"ch": 2**16}}}}}},
        "factor": {"model": {"scale_factor": []}},
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.mark.parametrize("tool", [precompute_latents, evaluate_vae, whiten_latents], ids=lambda tool: tool.__name__)
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("data", "data.params.video_size"),
        ("params", "data"),
        ("frames", "data.params.max_num_frames"),
        ("model", "model.first_stage_config.params.decoder_config.params.ch"),
        ("factor", "model.scale_factor"),
        ("huge", "model.first_stage_config.params"),  # or below it
    ],
)
def test_a_wrong_value_is_named_with_its_file(tool, name, key, folder, caplog):
    base = [CONFIGS / "tiny" / "cogvideox_tiny.yaml", CONFIGS / "tiny" / "sft.yaml", folder / f"{name}.yaml"]
    arguments = ["--base", *base, "--output", folder / "out.safetensors"]
    data = "--train_data" if tool is precompute_latents else "--data"
    assert tool.main([str(argument) for argument in (*arguments, data, folder / "data")]) == 2
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line.startswith(f"error: {folder / name}.yaml: {key}"), line
    assert not (folder / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        (
            {"decoder_config": {"target": "vae_modules.cp_enc_dec.ContextParallelDecoder3D", "params": {"ch": 2**60}}},
            "ch",
        ),
        ({"decoder_config": {"target": "torch.nn.Identity"}, "encoder_config": 5}, "encoder_config"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_a_file_of_latents_describes_a_vae_that_cannot_be(params, problem, tmp_path, caplog):
    described = {"target": "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper", "params": {"ckpt_path": VAE}}
    described["params"] |= params
    path = tmp_path / "a.safetensors"
    metadata = {"first_stage_config": json.dumps(described), "scale_factor": "1"}
    save_file({"latents": torch.zeros(1, 1, 16, 8, 8)}, path, metadata)
    assert decode_latents.main([str(path), "--device", "cpu"]) == 2
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line.startswith(f"error: {path}: model.first_stage_config.params") and problem in line, line
    assert not list(tmp_path.glob("*.mp4*"))
