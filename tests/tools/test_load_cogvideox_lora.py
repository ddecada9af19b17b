"""diffusers samples with an exported LoRA at its strength and at others.

Text-to-video and image-to-video are tested.
"""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cogvideox_sat.conversion.diffusers_lora_files import METADATA_KEY
from cogvideox_sat.conversion.lora_names import LORA_FILE
from lora_adapters import random_adapter
from pipelines import convert
from sgm.errors import UserError
from tool_runs import error_of
from tools.export_sat_lora_weight import main as export
from tools.load_cogvideox_lora import main, strength_of_flags
from videos import read_video

WIDTH, LAYERS, RANK = 256, 2, 4  # of the tiny models


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """Make the pipelines `5b` and `1.5_i2v`, and an adapter for both, exported to `lora`."""
    folder = tmp_path_factory.mktemp("load_lora")
    for family in ("5b", "1.5_i2v"):
        convert(tiny, family, folder / family)
    random_adapter(folder / "sat", WIDTH, LAYERS, RANK)
    command = ["--sat_pt_path", folder / "sat", "--lora_save_directory", folder / "lora"]
    assert export(list(map(str, command))) == 0
    return folder


@pytest.fixture
def image(tmp_path) -> Path:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "first.png")
    return tmp_path / "first.png"


def command(folder: Path, output: Path, *flags: str | Path, family: str = "5b", lora: str = "lora") -> list[str]:
    given = (
        "--model_path",
        folder / family,
        "--lora_path",
        folder / lora,
        "--prompt",
        "a boat",
        "--output_path",
        output,
    )
    small = ("--size", "32", "48", "--num_frames", "9", "--num_inference_steps", "2", "--device", "cpu")
    return list(map(str, (*given, *small, *flags)))


@pytest.mark.slow
def test_text_to_video_at_several_strengths(folder, tmp_path):
    videos = {}
    for scale in ("0", "0.5", "1"):
        assert main(command(folder, tmp_path / f"{scale}.mp4", "--lora_scale", scale)) == 0
        meta, videos[scale] = read_video(tmp_path / f"{scale}.mp4")
    assert (meta["size"], meta["fps"], len(videos["1"])) == ((48, 32), 8, 9)
    assert not torch.equal(torch.as_tensor(videos["0"]), torch.as_tensor(videos["1"]))
    assert not torch.equal(torch.as_tensor(videos["0.5"]), torch.as_tensor(videos["1"]))
    assert main(command(folder, tmp_path / "again.mp4", lora=f"lora/{LORA_FILE}")) == 0  # 1 is what nobody has to give
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "1.mp4").read_bytes()
    assert main(command(folder, tmp_path / "seed.mp4", "--seed", "1")) == 0
    assert (tmp_path / "seed.mp4").read_bytes() != (tmp_path / "1.mp4").read_bytes()


@pytest.mark.slow
def test_flags_of_the_public_tools(folder, tmp_path, caplog):
    """Other names for the paths, a folder for the output, and what is checked if it is given."""
    names = ["--model_dir", folder / "5b", "--lora-weights-path", folder / "lora", "--output-dir", tmp_path]
    size = ["--height", "32", "--width", "48", "--num_frames", "9", "--num_inference_steps", "2", "--device", "cpu"]
    checked = ["--lora_name", "mine", "--lora_r", RANK, "--generate_type", "t2v", "--num_videos_per_prompt", "2"]
    given = [str(word) for word in (*names, *size, *checked, "--prompt", "a boat")]
    assert main(given) == 0
    assert read_video(tmp_path / "output.mp4")[0]["size"] == (48, 32)
    assert (tmp_path / "output-1.mp4").read_bytes() != (tmp_path / "output.mp4").read_bytes()
    assert (tmp_path / "output.mp4").stat().st_mtime < (tmp_path / "output-1.mp4").stat().st_mtime

    def mistake(*flags: object) -> str:
        return error_of(main, caplog, *given, "--overwrite", *flags)

    assert "--lora_r is 8, but" in mistake("--lora_r", 8)
    assert "--generate_type i2v needs --image_path" in mistake("--generate_type", "i2v")
    assert "--lora_alpha is 3, but" in mistake("--lora_alpha", 3)
    at = given.index("--width")
    assert "--height, --width: only one of them is given" in error_of(main, caplog, *given[:at], *given[at + 2 :])


@pytest.mark.parametrize(("alpha", "expected"), [(None, 1.0), (8.0, 8 / RANK)])
def test_alpha_of_a_file_that_does_not_say_it(folder, tmp_path, alpha, expected):
    save_file(load_file(folder / "lora" / LORA_FILE), tmp_path / LORA_FILE)
    options = Namespace(lora_alpha=alpha, lora_r=RANK)
    assert strength_of_flags(options, tmp_path / LORA_FILE) == expected
    assert strength_of_flags(Namespace(lora_alpha=1.0, lora_r=None), folder / "lora") == 1.0


def test_the_rank_of_a_file_with_older_names(folder, tmp_path):
    """`down` and `up` are A and B; alpha does not need to be a number to be compared."""
    older = {"lora_A": "lora.down", "lora_B": "lora.up"}
    tensors = load_file(folder / "lora" / LORA_FILE)
    renamed = {re.sub("lora_[AB]", lambda match: older[match[0]], name): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / LORA_FILE)
    assert strength_of_flags(Namespace(lora_alpha=8.0, lora_r=RANK), tmp_path / LORA_FILE) == 8 / RANK
    with pytest.raises(UserError, match=f"--lora_r is 8, but .* has rank {RANK}; leave"):
        strength_of_flags(Namespace(lora_alpha=None, lora_r=8), tmp_path / LORA_FILE)
    save_file(renamed, tmp_path / LORA_FILE, {METADATA_KEY: json.dumps({"transformer.lora_alpha": "much"})})
    with pytest.raises(UserError, match=r"--lora_alpha is 8, but .* has 'much'; use --lora_scale"):
        strength_of_flags(Namespace(lora_alpha=8.0, lora_r=None), tmp_path / LORA_FILE)


def test_image_to_video(folder, tmp_path, image):
    flags = ("--image_path", image, "--negative_prompt", "blurred", "--no-dynamic_cfg")
    assert main(command(folder, tmp_path / "out.mp4", *flags, family="1.5_i2v")) == 0
    meta, frames = read_video(tmp_path / "out.mp4")
    assert (meta["size"], meta["fps"], len(frames)) == ((48, 32), 16, 9)


def test_a_dry_run_shows_what_goes_where(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    assert main(command(folder, tmp_path / "out.mp4", "--dry_run")) == 0
    assert "transformer_blocks.1.attn1.to_k.lora_B.weight [256, 4] -> transformer_blocks.1.attn1.to_k" in caplog.text
    assert not list(tmp_path.iterdir())


def test_mistakes(folder, tmp_path, image, caplog, monkeypatch):
    out = tmp_path / "new" / "out.mp4"

    def message(*flags: str | Path, **what: str) -> str:
        text = error_of(main, caplog, *command(folder, out, *flags, **what))
        assert not out.parent.exists()
        return text

    assert "CogVideoXImageToVideoPipeline; give --image_path" in message(family="1.5_i2v")
    assert "leave --image_path out" in message("--image_path", image)
    assert "no.png does not exist" in message("--image_path", tmp_path / "no.png")
    assert "must be multiples of 16" in message("--size", "30", "48")
    assert "must be 4k+1" in message("--num_frames", "8")
    assert "must be at least 1" in message("--num_inference_steps", "0")
    assert "is not a pipeline of diffusers" in message(family="lora")
    assert "nothing does not exist" in message(lora="nothing")

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert "is a FluxPipeline; use a" in message("--model_path", tmp_path / "other")
    tensors = load_file(folder / "lora" / LORA_FILE)
    deeper = {name.replace("blocks.1", "blocks.5"): tensor for name, tensor in tensors.items()}
    save_file(deeper, tmp_path / "deeper.safetensors")
    text = message("--lora_path", tmp_path / "deeper.safetensors")
    assert "does not fit: layer 5 to_k has width 256; the network has 2 layers of 256" in text
    (flat,) = (name for name in tensors if "0.attn1.to_q.lora_A" in name)
    save_file({**tensors, flat: torch.ones(4)}, tmp_path / "flat.safetensors")
    assert "lora_A.weight has shape [4]; expected a matrix" in message("--lora_path", tmp_path / "flat.safetensors")
    torch.save([torch.ones(2)], tmp_path / "list.bin")
    assert "is not a LoRA file" in message("--lora_path", tmp_path / "list.bin")
    (tmp_path / "cut.safetensors").write_bytes((folder / "lora" / LORA_FILE).read_bytes()[:-100])
    assert "not a readable safetensors file" in message("--lora_path", tmp_path / "cut.safetensors")
    broken = tmp_path / "broken"
    shutil.copytree(folder / "5b", broken)
    next((broken / "transformer").glob("*.safetensors")).write_bytes(b"no")
    assert "diffusers cannot load" in message("--model_path", broken)
    (tmp_path / "first.png").write_bytes(b"no")
    assert "cannot read the image" in message("--image_path", image, family="1.5_i2v")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the hub did not give model_index.json" in message("--model_path", "someone/no-such-model")

    existing = tmp_path / "mine.mp4"
    existing.write_text("mine")
    assert "exists; give --overwrite" in error_of(main, caplog, *command(folder, existing))
    assert existing.read_text() == "mine"
    monkeypatch.setattr("tools.load_cogvideox_lora.find_spec", lambda name: None)
    assert "pip install diffusers peft" in message()
