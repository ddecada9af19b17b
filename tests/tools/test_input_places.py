"""Tools search inputs in the current working directory, then in the repository's root.

They write to the current working directory.

`INPUTS` and `OUTPUTS` name every option of every tool that is a file or a folder; one that is missing fails a test.
"""

import argparse
import importlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from build_tiny_model import main as build_tiny_model
from chat_server import Reply, chat_server
from cogvideox_sat.commands import input_paths
from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.sampling.prompt_files import read_prompts
from conftest import place_parts
from lora_adapters import random_adapter
from lpips_weights import write_backbone
from training_clips import write_clip, write_dataset

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = {path.stem for path in (REPOSITORY / "tools").glob("*.py")}
# Scripts with torchrun's options, with tests of their own for paths, and without named files.
OTHERS = {"torchrun", "setup_environment", "web", "site_links", "write_api_page", "write_configuration_page"}

MODEL, MODEL_CONFIG, VAE = "tiny/5b", "tiny/5b.yaml", "assets/tiny/vae.safetensors"
CONFIG, DATA_CONFIG = "configs/tiny/cogvideox_tiny.yaml", "configs/tiny/sft.yaml"
CAPTION = "a large red circle moving left on a blue background"
WIDTH, LAYERS, RANK = 256, 2, 2

# Each command: from a folder that is empty, all inputs relative to the root, all outputs to the folder.
LORA = ("--model_path", "pipeline", "--lora_path", "exported", "--prompt", "a", "--dry_run")
COMMANDS = {
    "convert_weight_sat2hf": [
        *("--transformer_ckpt_path", MODEL, "--vae_ckpt_path", "tiny/vae.pt", "--text_encoder_cache_dir", "tiny/t5"),
        *("--lora_load", "run", "--base", MODEL_CONFIG, "--output_path", "out"),
    ],
    "convert_weight_hf2sat": ["--hf_path", "pipeline", "--output_path", "out"],
    "export_sat_lora_weight": ["--sat_pt_path", "run", "--lora_save_directory", "out"],
    "import_hf_lora": ["--lora_path", "exported", "--output", "out"],
    "merge_lora": ["--load", "run", "--lora", "exported:0.5", "--output", "out"],
    "export_weights": ["--input", "run", "--output", "out/weights.safetensors"],
    "decode_latents": ["latents", "--base", CONFIG],
    "estimate_memory": ["--base", CONFIG],
    "precompute_latents": ["--base", CONFIG, DATA_CONFIG, "--train_data", "data", "--output", "out"],
    "convert_demo": ["--input_file", "prompts/list.txt", "--output_file", "out/list.txt"],
    "evaluate_shapes": [
        *("--videos", "videos", "--input_file", "prompts/shapes.txt", "--own_accuracy_clips", "0"),
        *("--json", "out.json"),
    ],
    "evaluate_vae": [
        *("--base", CONFIG, DATA_CONFIG, "--data", "data", "--ckpt", VAE, "--num_clips", "1", "--num_videos", "1"),
        *("--lpips_net", "squeeze", "--lpips_weights", "squeeze.pt", "--json", "out.json"),
    ],
    "whiten_latents": [
        *("--base", CONFIG, DATA_CONFIG, "--data", "data", "--ckpt", VAE, "--near", VAE, "--num_clips", "2"),
        *("--output", "out.safetensors"),
    ],
    "load_cogvideox_lora": LORA,
}
WRITTEN = {
    "convert_weight_sat2hf": "out/model_index.json",
    "convert_weight_hf2sat": "out/model.yaml",
    "export_sat_lora_weight": "out/pytorch_lora_weights.safetensors",
    "import_hf_lora": "out/lora.yaml",
    "merge_lora": "out/latest",
    "export_weights": "out/weights.safetensors",
    "decode_latents": "latents/deep/a.mp4",  # beside its name
    "precompute_latents": "out/cache.json",
    "convert_demo": "out/list.txt",
    "evaluate_shapes": "out.json",
    "evaluate_vae": "outputs/vae",
    "whiten_latents": "out.safetensors",
}

# Options that name what is read, each with a command that goes on to it; GONE takes the place of the input.
GONE = "gone/away"
INPUTS = {
    "convert_weight_sat2hf": {
        name: [*COMMANDS["convert_weight_sat2hf"], f"--{name}", GONE]
        for name in ("transformer_ckpt_path", "vae_ckpt_path", "text_encoder_cache_dir", "lora_load", "base")
    },
    "convert_weight_hf2sat": {"hf_path": ["--hf_path", "/".join([GONE, "x"]), "--output_path", "out"]},
    "export_sat_lora_weight": {"sat_pt_path": [*COMMANDS["export_sat_lora_weight"], "--sat_pt_path", GONE]},
    "import_hf_lora": {"lora_path": ["--lora_path", "/".join([GONE, "x"]), "--output", "out"]},
    "merge_lora": {
        "load": [*COMMANDS["merge_lora"], "--load", GONE],
        "lora": ["--load", "run", "--lora", "exported", f"{GONE}:2", "--output", "out"],
    },
    "export_weights": {"input": [*COMMANDS["export_weights"], "--input", GONE]},
    "decode_latents": {"paths": ["latents", GONE], "base": ["latents", "--base", CONFIG, GONE]},
    "estimate_memory": {"base": ["--base", CONFIG, GONE]},
    "precompute_latents": {
        name: [*COMMANDS["precompute_latents"], f"--{name}", GONE] for name in ("base", "train_data")
    },
    "convert_demo": {
        "input_file": ["--input_file", f"{GONE}.txt", "--output_file", "out.txt"],
        "image_path": ["--prompt", "a", "--image_path", GONE],
    },
    "evaluate_shapes": {name: [*COMMANDS["evaluate_shapes"], f"--{name}", GONE] for name in ("videos", "input_file")},
    "evaluate_vae": {
        name: [*COMMANDS["evaluate_vae"], f"--{name}", GONE]
        for name in ("base", "data", "ckpt", "lpips_weights", "i3d_weights")
    },
    "whiten_latents": {
        name: [*COMMANDS["whiten_latents"], f"--{name}", GONE] for name in ("base", "data", "ckpt", "near")
    },
    "load_cogvideox_lora": {
        "model_path": [*LORA, "--model_path", "/".join([GONE, "x"])],
        "lora_path": [*LORA, "--lora_path", "/".join([GONE, "x"])],
        "image_path": [*LORA, "--image_path", GONE],
    },
    "make_shapes_dataset": {},
    "train_text_encoder": {},
}
# Options that name what is written, which is never looked for anywhere else.
OUTPUTS = {
    "convert_weight_sat2hf": {"output_path"},
    "convert_weight_hf2sat": {"output_path", "cache_dir"},
    "export_sat_lora_weight": {"lora_save_directory"},
    "import_hf_lora": {"output"},
    "merge_lora": {"output"},
    "export_weights": {"output"},
    "decode_latents": {"output_dir"},
    "estimate_memory": set(),
    "precompute_latents": {"output"},
    "convert_demo": {"output_file"},
    "evaluate_shapes": {"json"},
    "evaluate_vae": {"output", "json"},
    "whiten_latents": {"output"},
    "load_cogvideox_lora": {"output_path", "output_dir"},
    "make_shapes_dataset": {"output", "prompts_file"},
    "train_text_encoder": {"output"},
}
FOR_PATHS = {"PATH", "FILE", "FOLDER", "DATA", "YAML", "PATH[:WEIGHT]"}  # metavars of paths in the help
OF_TRAINING = {"train_data", "base"}  # parsed by train_video for precompute_latents

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Iterator[Path]:
    """Make a repository's root with inputs of every kind."""
    from tools.convert_weight_sat2hf import main as to_diffusers
    from tools.export_sat_lora_weight import main as export

    root = tmp_path_factory.mktemp("root")
    for name in ("assets", "configs"):
        (root / name).symlink_to(REPOSITORY / name)
    random_adapter(root / "run", WIDTH, LAYERS, RANK)
    (root / "run" / "training_config.yaml").write_text(yaml.safe_dump({"args": {"load": MODEL}}))
    config = load_configs([REPOSITORY / "tests" / "configs" / "5b.yaml"])
    for folder in (root / "tiny", Path("tiny")):  # the folder of the parts, and its name in the configuration
        config["args"] = {"load": str(folder / "5b")}
        place_parts(config["model"], folder)
        (root / MODEL_CONFIG).parent.mkdir(exist_ok=True)
        (root / MODEL_CONFIG).write_text(yaml.safe_dump(config))
        if folder.is_absolute():
            assert build_tiny_model(["--config", str(root / MODEL_CONFIG)]) == 0
    assert export(["--sat_pt_path", str(root / "run"), "--lora_save_directory", str(root / "exported")]) == 0
    parts = {"transformer_ckpt_path": MODEL, "vae_ckpt_path": "tiny/vae.pt", "base": MODEL_CONFIG}
    command = [word for name, path in parts.items() for word in (f"--{name}", str(root / path))]
    assert to_diffusers([*command, "--output_path", str(root / "pipeline")]) == 0
    write_dataset(root / "data", clips=2, frames=9, sizes=[(64, 64)])
    (root / "latents" / "deep").mkdir(parents=True)
    save_file({"latents": torch.randn(1, 1, 16, 8, 8)}, root / "latents" / "deep" / "a.safetensors")
    (root / "prompts").mkdir()
    Image.new("RGB", (30, 20), "red").save(root / "prompts" / "a.png")
    (root / "prompts" / "list.txt").write_text("a cat@@a.png\na dog@@prompts/a.png\n")
    (root / "prompts" / "shapes.txt").write_text(f"{CAPTION}\n")
    write_clip(root / "videos" / f"0_{CAPTION.replace(' ', '_')}" / "0" / "000000.mp4", frames=9, size=(64, 64))
    write_backbone(root / "squeeze.pt", "squeezenet1_1")
    yield root


@pytest.fixture
def here(root, tmp_path, monkeypatch) -> Path:
    """Return an empty folder, now the current one, with `root` as the repository's root."""
    monkeypatch.setattr(input_paths, "ROOT", root)
    monkeypatch.setattr(input_paths, "_notes", [])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def main_of(tool: str):
    return importlib.import_module(f"tools.{tool}").main


def contents(folder: Path) -> set[Path]:
    """Return what is in a folder, without the index of a data set, which stays with its clips."""
    return {path.relative_to(folder) for path in folder.rglob("*") if path.name != ".clip_index.json"}


@pytest.mark.parametrize("tool", COMMANDS)
@pytest.mark.slow
def test_inputs_are_found_in_the_root_and_outputs_are_here(tool, root, here, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    before = contents(root)
    with chat_server(lambda *_: Reply()) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "key")
        assert main_of(tool)(list(COMMANDS[tool])) == 0
    assert contents(root) == before
    assert f"is taken from {root}" in caplog.text
    assert (here / WRITTEN[tool]).exists() if tool in WRITTEN else not contents(here)
    if tool == "convert_demo":  # images are found from the new file
        image = root / "prompts" / "a.png"
        assert [each.image for each in read_prompts(here / "out" / "list.txt")] == [image] * 2


@pytest.mark.parametrize(("tool", "name"), [(tool, name) for tool, names in INPUTS.items() for name in names])
def test_an_input_in_neither_place_is_named_with_both(tool, name, root, here, caplog):
    before = contents(root)
    assert main_of(tool)(INPUTS[tool][name]) == 2
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert GONE in line and line.count(f"neither in {here} nor in {root}") == 1, line
    assert "is taken from" not in caplog.text  # a mistake is the only line
    assert not contents(here) and contents(root) == before


@pytest.mark.parametrize("pattern", ["gone/*.tar", "gone/{000..010}.tar"])
@pytest.mark.parametrize(
    ("tool", "argument"),
    [("evaluate_vae", "--data"), ("whiten_latents", "--data"), ("precompute_latents", "--train_data")],
)
def test_a_pattern_that_nothing_fits_is_named_with_both_places(tool, argument, pattern, root, here, caplog):
    assert main_of(tool)([*COMMANDS[tool], argument, pattern]) == 2
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line.startswith(f"error: {argument.removeprefix('--') if tool == 'precompute_latents' else argument}: ")
    assert f"neither in {here} nor in {root}" in line and not contents(here)


class Parsed(BaseException):
    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


@pytest.mark.parametrize("tool", sorted(SCRIPTS - OTHERS))
def test_every_path_is_in_the_tables(tool, monkeypatch):
    def parsed(parser: argparse.ArgumentParser, *_):
        raise Parsed(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parsed)
    with pytest.raises(Parsed) as caught:
        main_of(tool)([])
    actions = caught.value.parser._actions
    paths = {each.dest for each in actions if each.type is Path or FOR_PATHS & {each.metavar}}
    of_training = OF_TRAINING if tool == "precompute_latents" else set()
    assert paths == {*INPUTS[tool]} - of_training | OUTPUTS[tool]


def test_what_is_here_comes_first(root, here, caplog):
    """Latents of the current working directory come first, and the log names the others."""
    caplog.set_level(logging.INFO)
    shutil.copytree(root / "latents", here / "latents")
    assert main_of("decode_latents")(["latents/deep/a.safetensors", "--base", CONFIG]) == 0
    assert contents(here) == {Path(name) for name in ("latents", "latents/deep", *DECODED)}
    assert f"taken from the current working directory; {root} has one too" in caplog.text


DECODED = ("latents/deep/a.safetensors", "latents/deep/a.mp4")
