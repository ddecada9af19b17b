"""The tiny model's files load as configured, and are built only when needed.

They give activations of normal size.
"""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from build_tiny_model import main
from cogvideox_sat.shapes.tiny_text_encoder import sentences, train_vocabulary
from sgm.util import instantiate_from_config
from support import Reference

TOOL = Path(__file__).parent / "build_tiny_model.py"


def write_config(folder: Path, name: str, case: str) -> Path:
    """Return the configuration of a recorded case, with its parts under `folder`.

    Cases share the VAE and the text encoder.
    """
    model = Reference(f"engine/{case}").case["model"]
    model["first_stage_config"]["params"]["ckpt_path"] = str(folder / "vae" / "3d-vae.pt")
    model["conditioner_config"]["params"]["emb_models"][0]["params"]["model_dir"] = str(folder / "t5")
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"args": {"load": str(folder / name)}, "model": model}))
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """Return the configurations `t2v` and `i2v`, and their parts."""
    folder = tmp_path_factory.mktemp("tiny")
    configs = {"t2v": write_config(folder, "t2v", "t2v_2b"), "i2v": write_config(folder, "i2v", "i2v_5b")}
    assert main(["--config", *map(str, configs.values())]) == 0
    return {**configs, "folder": folder}


def model_of(path: Path) -> dict:
    return yaml.safe_load(path.read_text())["model"]


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["t2v", "i2v"])
def test_network_checkpoint_fits_its_configuration(built, name):
    folder = built["folder"] / name
    iteration = (folder / "latest").read_text()
    checkpoint = torch.load(folder / iteration / "mp_rank_00_model_states.pt", weights_only=True)
    assert set(checkpoint) == {"module"}
    prefix = "model.diffusion_model."
    assert all(key.startswith(prefix) for key in checkpoint["module"])
    network = instantiate_from_config(model_of(built[name])["network_config"])
    state = {key.removeprefix(prefix): tensor for key, tensor in checkpoint["module"].items()}
    expected = network.state_dict()
    network.load_state_dict(state, strict=True)
    if name == "t2v":  # its sincos table is not random
        assert torch.equal(state["mixins.pos_embed.pos_embedding"], expected["mixins.pos_embed.pos_embedding"])
    images = torch.randn(1, 3, 32 if name == "i2v" else 16, 8, 12)
    with torch.no_grad():
        output = network(images, timesteps=torch.tensor([500]), context=torch.randn(1, 16, 64))
    assert 0.2 < output.std() < 5


def test_vae_decodes_noise_to_varied_colours(built):
    config = model_of(built["t2v"])["first_stage_config"]
    vae = instantiate_from_config(config).eval()  # loads ckpt_path
    latents = torch.randn(1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        frames = vae.decode(latents)
    assert frames.shape == (1, 3, 9, 64, 96)
    assert (frames.abs() < 1).float().mean() > 0.95
    assert (frames.std(dim=(0, 2, 3, 4)) > 0.2).all()
    assert (frames.mean(dim=(0, 2, 3, 4)).abs() < 0.1).all()
    assert (frames[:, 0] - frames[:, 1]).std() > 0.2


def test_text_encoder_tells_prompts_apart_and_knows_all_of_ascii(built):
    config = model_of(built["t2v"])["conditioner_config"]["params"]["emb_models"][0]
    embedder = instantiate_from_config(config)
    states = embedder(["a red circle moving left", "a blue circle moving left", ""])
    assert states.shape == (3, 16, 64)
    assert 0.5 < states.std() < 2
    assert (states[0] - states[1]).norm() > 0.1 * states[0].norm()
    printable = " ".join(map(chr, range(33, 127)))
    assert embedder.tokenizer.unk_token_id not in embedder.tokenizer(printable)["input_ids"]
    tokens = embedder.tokenizer("a dog runs on the beach")
    assert tokens["input_ids"][-1] == 1
    assert len(tokens["input_ids"]) <= 12  # words of the training sentences have few pieces


def test_the_vocabulary_depends_on_the_seed_alone():
    def vocabulary(seed: int) -> bytes:
        return train_vocabulary(sentences(500, seed))

    assert vocabulary(3) == vocabulary(3)
    assert vocabulary(3) != vocabulary(4)


def test_what_is_there_and_fits_is_left_alone(built):
    before = snapshot(built["folder"])
    assert main(["--config", str(built["i2v"]), str(built["t2v"])]) == 0
    assert snapshot(built["folder"]) == before
    assert not list(built["folder"].glob(".building-*"))


def test_a_changed_configuration_rebuilds_its_own_part_and_the_same_seed_gives_the_same_weights(built, tmp_path):
    first = write_config(tmp_path, "t2v", "t2v_2b")
    assert main(["--config", str(first)]) == 0
    weights = Path("t2v", "1", "mp_rank_00_model_states.pt")
    one, two = (torch.load(folder / weights)["module"] for folder in (built["folder"], tmp_path))
    assert all(torch.equal(one[key], two[key]) for key in one)

    before = snapshot(tmp_path)
    config = yaml.safe_load(first.read_text())
    config["model"]["network_config"]["params"]["num_layers"] = 1
    first.write_text(yaml.safe_dump(config))
    assert main(["--config", str(first)]) == 0
    changed = {path.name for path, stamp in snapshot(tmp_path).items() if before.get(path) != stamp}
    assert changed == {"t2v.yaml", ".t2v.built", "latest", weights.name}
    assert not any(".layers.1." in key for key in torch.load(tmp_path / weights)["module"])

    assert main(["--config", str(first), "--force", "--seed", "1"]) == 0
    assert all(before.get(path) != stamp for path, stamp in snapshot(tmp_path).items())


def test_an_overlay_and_a_lora_do_not_change_the_base_network(built, tmp_path):
    config = yaml.safe_load(built["t2v"].read_text())
    config["model"]["network_config"]["params"]["modules"]["lora_config"] = {
        "target": "sat.model.finetune.lora2.LoraMixin",
        "params": {"r": 4},
    }
    lora = tmp_path / "lora.yaml"
    lora.write_text(yaml.safe_dump({"model": config["model"]}))
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"args": config["args"]}))
    before = snapshot(built["folder"])
    assert main(["--config", str(lora), str(overlay)]) == 0
    assert snapshot(built["folder"]) == before


def refused(caplog, *arguments: object) -> str:
    """Return the tool's error, on one line."""
    caplog.clear()
    with caplog.at_level(logging.ERROR):
        assert main([*map(str, arguments)]) == 1
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    return record.getMessage()


def test_files_of_others_are_never_touched(tmp_path, caplog):
    config = write_config(tmp_path, "t2v", "t2v_2b")
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "model.safetensors").write_text("precious")
    assert "t5 exists and was not built by this tool" in refused(caplog, "--config", config, "--force")
    assert (tmp_path / "t5" / "model.safetensors").read_text() == "precious"


def test_mistakes_in_configurations_are_named(tmp_path, caplog):
    config = write_config(tmp_path, "t2v", "t2v_2b")
    other = write_config(tmp_path, "i2v", "i2v_5b")
    content = yaml.safe_load(other.read_text())
    other.write_text(yaml.safe_dump({**content, "args": {"load": str(tmp_path / "t2v")}}))
    assert "t2v is claimed by another configuration" in refused(caplog, "--config", config, other)
    other.write_text(yaml.safe_dump({"model": content["model"]}))
    assert "'args.load' is missing" in refused(caplog, "--config", other)
    other.write_text(yaml.safe_dump({"args": content["args"]}))
    assert "has a model.network_config" in refused(caplog, "--config", other)
    assert "none.yaml" in refused(caplog, "--config", tmp_path / "none.yaml")
    assert not list(tmp_path.glob("*t5*"))


def test_help_and_a_second_run_import_nothing_heavy(built):
    for arguments in (["--help"], ["--config", built["t2v"]]):
        command = [sys.executable, "-X", "importtime", TOOL, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True)
        lines = done.stderr.splitlines()
        assert all(line.startswith("import time:") for line in lines)
        assert "argparse" in done.stderr and not any(line.endswith("| torch") for line in lines)
