"""Pipelines of diffusers become checkpoints and configurations, or are loaded directly."""

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.weights.loading import load_network
from pipelines import FAMILIES, assert_identical, checkpoint, convert, pipelines  # noqa: F401
from sgm.util import instantiate_from_config
from sgm.weights import module_weights, read_state_dict
from tool_runs import error_of, error_on_a_full_disk
from tools.convert_weight_hf2sat import main

ROOT = Path(__file__).parents[2]

# Without a network: what the hub's client asks for goes to a port where nobody listens.
OFFLINE = """
import sys
from tools.convert_weight_hf2sat import main
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def mistake(caplog, *arguments) -> str:
    return error_of(main, caplog, *arguments)


@pytest.fixture(scope="module")
def returned(pipelines, tmp_path_factory) -> Path:  # noqa: F811
    """Return the conversions of the pipelines of all families."""
    folder = tmp_path_factory.mktemp("returned")
    for family in FAMILIES:
        assert run("--hf_path", pipelines / family, "--output_path", folder / family) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_every_bit_is_the_same(tiny, returned, family):
    assert_identical(checkpoint(returned / family / "transformer"), checkpoint(tiny.folder / family))
    vae = read_state_dict(returned / family / "vae" / "3d-vae.pt")
    assert_identical(vae["state_dict"], module_weights(read_state_dict(tiny.folder / "vae.pt"), what="vae"))
    encoder = {path.name: path.read_bytes() for path in (tiny.folder / "t5").iterdir()}
    assert {path.name: path.read_bytes() for path in (returned / family / "t5-v1_1-xxl").iterdir()} == encoder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_describes_the_same_model(tiny, returned, family):
    """Network, VAE and conditioner have the same tensors, and the diffusion equal numbers."""
    ours, theirs = (
        load_configs([tiny.config(family)])["model"],
        load_configs([returned / family / "model.yaml"])["model"],
    )

    def shapes(config, part):
        config = config[part]
        if part == "first_stage_config":
            config = {**config, "params": {**config["params"], "ckpt_path": None}}
        return {name: tensor.shape for name, tensor in instantiate_on_meta(config).state_dict().items()}

    for part in ("network_config", "first_stage_config"):
        assert shapes(ours, part) == shapes(theirs, part)
    assert theirs["scale_factor"] == ours["scale_factor"]
    for part in ("sampler_config", "denoiser_config"):
        name = "discretization_config"
        assert theirs[part]["params"][name] == ours[part]["params"][name]
    embedder = theirs["conditioner_config"]["params"]["emb_models"][0]["params"]
    assert embedder == {"model_dir": str((returned / family / "t5-v1_1-xxl").resolve()), "max_length": 64}
    assert ours.get("noised_image_input", False) == theirs.get("noised_image_input", False)


@pytest.mark.slow
def test_videos_are_sampled_with_the_pair_of_configurations(returned, tmp_path):
    from sample_video import main as sample

    (tmp_path / "prompts.txt").write_text("a prompt\n")
    folder = returned / "2b"
    command = ["--base", folder / "model.yaml", folder / "inference.yaml", "--input_file", tmp_path / "prompts.txt"]
    command += ["--output_dir", tmp_path / "out", "--sampling_num_steps", 1, "--device", "cpu"]
    assert sample([str(word) for word in command]) == 0
    assert list(tmp_path.glob("out/0_a*prompt/0/000000.mp4"))
    pair = load_configs([returned / "1.5_i2v" / "model.yaml", returned / "1.5_i2v" / "inference.yaml"])
    assert pair["args"]["input_type"] == "cli" and pair["args"]["image2video"] is True
    assert (pair["args"]["sampling_num_frames"], pair["args"]["sampling_image_size"]) == (6, [128, 192])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_is_loaded_as_it_is(tiny, pipelines, family):  # noqa: F811
    """`load` and `ckpt_path` may name its folder, or those of its parts."""
    config = load_configs([tiny.config(family)])["model"]
    for folder in (pipelines / family, pipelines / family / "transformer"):
        network = instantiate_on_meta(config["network_config"])
        load_network(network, folder)
        names = checkpoint(tiny.folder / family)
        assert_identical({f"model.diffusion_model.{n}": t for n, t in network.state_dict().items()}, names)
    vae = module_weights(read_state_dict(tiny.folder / "vae.pt"), what="vae")
    for folder in (pipelines / family, pipelines / family / "vae"):
        config["first_stage_config"]["params"]["ckpt_path"] = str(folder)
        assert_identical(dict(instantiate_from_config(config["first_stage_config"]).state_dict()), vae)


def test_tables_that_no_file_holds_are_the_networks_own(tiny, pipelines, tmp_path):  # noqa: F811
    """As in a pipeline from the hub: the one that the network does not use is zero."""
    shutil.copytree(pipelines / "5b", tmp_path / "5b")
    (tmp_path / "5b" / "transformer" / "sat_tables.safetensors").unlink()
    config = load_configs([tiny.config("5b")])["model"]
    network = instantiate_on_meta(config["network_config"])
    load_network(network, tmp_path / "5b")
    weights = checkpoint(tiny.folder / "5b")
    unused = "model.diffusion_model.transformer.position_embeddings.weight"
    weights[unused] = torch.zeros_like(weights[unused])
    assert_identical({f"model.diffusion_model.{n}": t for n, t in network.state_dict().items()}, weights)
    assert run("--hf_path", tmp_path / "5b", "--output_path", tmp_path / "out") == 0
    assert_identical(checkpoint(tmp_path / "out" / "transformer"), weights)


def test_dtypes_and_the_text_encoder_are_a_choice(pipelines, tmp_path):  # noqa: F811
    flags = ("--bf16", "--no-text_encoder")
    assert run("--hf_path", pipelines / "2b", "--output_path", tmp_path / "out", *flags) == 0
    assert {tensor.dtype for tensor in checkpoint(tmp_path / "out" / "transformer").values()} == {torch.bfloat16}
    config = load_configs([tmp_path / "out" / "model.yaml"])
    assert config["args"]["bf16"] is True and config["args"]["fp16"] is False
    assert "conditioner_config" not in yaml.safe_load((tmp_path / "out" / "model.yaml").read_text())["model"]
    assert not (tmp_path / "out" / "t5-v1_1-xxl").exists()


def test_a_dry_run_shows_the_map_and_writes_nothing(pipelines, tmp_path, caplog):  # noqa: F811
    caplog.set_level("INFO")
    assert run("--hf_path", pipelines / "2b", "--output_path", tmp_path / "out", "--dry_run") == 0
    parts = ", ".join(f"transformer_blocks.1.attn1.to_{x}.bias" for x in "qkv")
    assert f"transformer.layers.1.attention.query_key_value.bias [768] <- {parts}" in caplog.messages
    assert (
        "decoder.up.3.block.0.norm1.conv_y.conv.bias [128] <- decoder.up_blocks.0.resnets.0.norm1.conv_y.conv.bias"
        in (caplog.messages)
    )
    assert any(m.startswith("mixins.pos_embed.pos_embedding [1, 544, 256]") for m in caplog.messages)
    assert not list(tmp_path.iterdir())


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_bad_folders_are_one_line_and_leave_nothing(tiny, tmp_path, caplog):
    good = convert(tiny, "5b", tmp_path / "good")
    weights = load_file(good / "transformer" / "diffusion_pytorch_model.safetensors")

    def without(folder: Path, name: str) -> None:
        save_file(
            {n: t for n, t in weights.items() if n != name},
            folder / "transformer" / "diffusion_pytorch_model.safetensors",
        )

    def cut(folder: Path, file: str) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:5000])

    config = "transformer/config.json"
    cases = [
        (lambda f: (f / "model_index.json").unlink(), "is not a pipeline of diffusers, it has no model_index.json"),
        (lambda f: (f / config).unlink(), "does not exist"),
        (lambda f: (f / config).write_text("{"), "cannot read "),
        (lambda f: change_json(f / config, _class_name="FluxTransformer2DModel"), "got a FluxTransformer2DModel"),
        (lambda f: change_json(f / config, num_layers=30), "num_layers is 30, but the tensors are of 2"),
        (lambda f: change_json(f / config, sample_frames="many"), "num_frames: got 'many'"),
        (
            lambda f: change_json(f / config, sample_frames=10**18),
            "num_frames: got 1000000000000000000; expected",
        ),
        (lambda f: change_json(f / config, max_text_seq_length=2.5), "text_length: got 2.5; expected a whole number"),
        (lambda f: change_json(f / config, norm_eps=1e-3), "norm_eps: got 0.001; models here have 1e-05"),
        (lambda f: change_json(f / config, activation_fn="gelu"), "activation_fn: got 'gelu'"),
        (
            lambda f: change_json(f / "vae" / "config.json", norm_num_groups=16),
            "norm_num_groups: got 16; models here have",
        ),
        (
            lambda f: without(f, "transformer_blocks.1.attn1.to_k.bias"),
            "'transformer_blocks.1.attn1.to_k.bias' is missing",
        ),
        (lambda f: without(f, "proj_out.bias"), "lacks mixins.final_layer.linear.bias"),
        (lambda f: cut(f, "transformer/diffusion_pytorch_model.safetensors"), "is not a readable safetensors file"),
        (lambda f: cut(f, "vae/diffusion_pytorch_model.safetensors"), "is not a readable safetensors file"),
        (lambda f: shutil.rmtree(f / "scheduler"), "does not exist"),
        (lambda f: change_json(f / "text_encoder" / "config.json", d_model=4096), "of width 4096; the network takes"),
        (lambda f: (f / "tokenizer" / "spiece.model").unlink(), "no tokenizer"),
    ]
    for i, (damage, message) in enumerate(cases):
        folder = tmp_path / f"bad{i}"
        shutil.copytree(good, folder)
        damage(folder)
        line = mistake(caplog, "--hf_path", folder, "--output_path", tmp_path / "out")
        assert message in line
        assert str(folder) in line
        shutil.rmtree(folder)
    assert "/nowhere/at/all does not exist" in mistake(caplog, "--hf_path", "/nowhere/at/all", "--output_path", "out")
    assert "is read from" in mistake(caplog, "--hf_path", good, "--output_path", tmp_path, "--overwrite")
    assert "exists; give --overwrite" in mistake(caplog, "--hf_path", good, "--output_path", good)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(pipelines, tmp_path):  # noqa: F811
    out = tmp_path / "new" / "out"
    line = error_on_a_full_disk(
        "convert_weight_hf2sat.py", 300_000, "--hf_path", pipelines / "5b", "--output_path", out
    )
    assert line == f"error: cannot write {out}: File too large"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("flags", "with_text"), [([], True), (["--no-text_encoder"], False)])
def test_only_what_is_needed_is_downloaded(pipelines, tmp_path, monkeypatch, flags, with_text):  # noqa: F811
    patterns = []

    def download(repository: str, allow_patterns: list[str], **_: object) -> str:
        patterns.extend(allow_patterns)
        return str(tmp_path / "empty")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert main(["--hf_path", "someone/pipeline", "--output_path", str(tmp_path / "out"), *flags]) == 2
    files = [str(path.relative_to(pipelines / "5b")) for path in (pipelines / "5b").rglob("*") if path.is_file()]
    wanted = {file for file in files if any(fnmatch(file, pattern) for pattern in patterns)}
    is_text = re.compile("text_encoder/|tokenizer/").match
    assert wanted == {file for file in files if with_text or not is_text(file)}


def test_a_hub_id_without_a_network(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "sat")])}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", OFFLINE, "--hf_path", "nobody/nothing", "--output_path", str(tmp_path / "out")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    lines = result.stderr.splitlines()
    assert "--hf_path: nobody/nothing does not exist here" in lines[-1] and "the hub did not give it" in lines[-1]
    assert "Traceback" not in result.stderr
