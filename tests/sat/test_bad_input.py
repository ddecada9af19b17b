"""A mistake gives exit code 2 and one line before PyTorch is imported.

Nothing is written.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cogvideox_sat.configuration.files import load_configs

ROOT = Path(__file__).parents[2]

# Runs each command line of a JSON list and prints, as JSON, its exit code, what it logged, and whether PyTorch came in.
DRIVER = """
import io, json, logging, sys, traceback
from sample_video import main
results = []
for command in json.load(sys.stdin):
    log = io.StringIO()
    logging.basicConfig(stream=log, force=True, level=logging.INFO, format="%(message)s")
    try:
        code = main(command)
    except Exception:
        code = traceback.format_exc()
    results.append([code, log.getvalue(), "torch" in sys.modules])
print(json.dumps(results))
"""


def case(*arguments: str, says: str, config: dict | str | None = None, prompts: str = "a boat", i2v: bool = False):
    """Return a command line, changes of the model's file, and the expected error.

    `{folder}` stands for the test's folder.
    """
    return {"arguments": arguments, "says": says, "config": config, "prompts": prompts, "i2v": i2v}


def params(**changes) -> dict:
    return {"model": {"network_config": {"params": changes}}}


CASES = {
    # Arguments
    "unknown argument": case("--sampling_fpss", "8", says="--sampling_fpss; did you mean --sampling_fps?"),
    "unknown argument with =": case("--sede=4", says="unknown argument --sede; did you mean --seed?"),
    "unlike any argument": case("--xyzzy", says="unknown argument --xyzzy; --help lists them all"),
    "stray word": case("--seed", "4", "boat", says="unexpected 'boat'"),
    "not a number": case("--seed", "four", says="--seed: invalid int value: 'four'"),
    "not a choice": case("--offload", "all", says="--offload: invalid choice: 'all'"),
    "negative seed": case("--seed", "-1", says="seed: got -1; expected a whole number from 0 to 2^63"),
    "huge seed": case("--seed", str(2**63), says="expected a whole number from 0 to 2^63 - 1"),
    "too many steps": case("--steps", "1001", says="steps: got 1001; this model's noise schedule has 1 to 1000 steps"),
    "both lengths": case("--frames", "9", "--sampling_num_frames", "3", says="frames: sampling_num_frames is given"),
    "misspelt sampler": case("--sampler", "dimm", says="sampler: got 'dimm'; did you mean ddim?"),
    "no interval": case("--guidance_interval", "1", "0", says="guidance_interval: got [1.0, 0.0]; expected two shares"),
    "no key": case("--set", "model.scale_facto=1", says="--set model.scale_facto: model has no 'scale_facto'; did you"),
    "no adapter": case("--lora", "nowhere:0.5", says="lora: nowhere does not exist"),
    "no steps": case("--sampling_num_steps", "0", says="sampling_num_steps: got 0; it must be at least 1"),
    "no videos": case("--batch_size", "0", says="batch_size: got 0"),
    "odd tiles": case("--vae_tile_size", "100", says="vae_tile_size: got 100; it must be a multiple of 8, at least 64"),
    "odd device": case("--device", "gpu", says="device: got 'gpu'; it can be cpu, cuda or cuda:N"),
    "a VAE shared otherwise than the network": case(
        config={"model": {"first_stage_config": {"params": {"cp_size": 2}}}},
        says="cp_size is 2 and model_parallel_size 1",
    ),
    "both dtypes": case("--fp16", "--bf16", says="fp16 and bf16 are both on"),
    "contradiction": case("--overwrite", "--skip_existing", says="overwrite and skip_existing are both on"),
    "one side": case("--sampling_image_size", "32", says="expected height and width"),
    # The args section
    "unknown key": case(config={"args": {"batchsize": 2}}, says="unknown key 'batchsize'; did you mean batch_size?"),
    "key of no command": case(config={"args": {"train_itres": 8}}, says="args: unknown key 'train_itres'"),
    "wrong type": case(config={"args": {"batch_size": "two"}}, says="batch_size: got 'two'; expected a whole number"),
    "bool for int": case(config={"args": {"seed": True}}, says="args: seed: got True; expected a whole number"),
    "wrong items": case(config={"args": {"sampling_image_size": [32, "48"]}}, says="expected whole numbers"),
    "wrong choice": case(config={"args": {"mode": "serve"}}, says="mode: got 'serve'; it can be inference, finetune"),
    "args a list": case(config="args: [load]\n", says="the section 'args': got ['load']; expected keys"),
    # Configuration files
    "no --base": case(says="--base: missing"),
    "missing file": case("--base", "{folder}/nothing.yaml", says="nothing.yaml: No such file"),
    "a folder": case("--base", "{folder}", says="Is a directory"),
    "not YAML": case(config="model:\n  - a\n  b: [\n", says="not valid YAML"),
    "no mapping": case(config="- a\n", says="expected sections (args, model, deepspeed, data, lightning)"),
    "not text": case("--base", "{folder}/binary", says="is not UTF-8 text"),
    "unknown section": case(config={"modle": {}}, says="unknown section 'modle'"),
    "no model": case("--base", "{folder}/empty.yaml", says="model.network_config: missing"),
    "model a text": case("--base", "{folder}/model_text.yaml", says="the section 'model': got 'text'"),
    "list over mapping": case(config={"model": {"sampler_config": [1]}}, says="cannot merge"),
    "no sampler": case(config={"model": {"sampler_config": None}}, says="model.sampler_config: missing"),
    "odd include": case(config={"include": [5]}, says="include: got [5]; expected the names of files"),
    "unresolved": case(config={"args": {"output_dir": "${nowhere}"}}, says="cannot merge"),
    "no such module": case(
        config={"model": {"first_stage_config": {"target": "vae_modules.nothing.VAE"}}},
        says="change.yaml: model.first_stage_config.target: vae_modules.nothing.VAE: module 'vae_modules.nothing' does",
    ),
    "no such class": case(
        config=params(modules={"pos_embed_config": {"target": "dit_video_concat.Rotary"}}),
        says="model.network_config.params.modules.pos_embed_config.target: dit_video_concat.Rotary: module",
    ),
    "no import path": case(config={"model": {"sampler_config": {"target": "Euler"}}}, says="not an import path"),
    "no size": case(config=params(latent_width=None), says="params.latent_width: got None; expected a positive whole"),
    "no modules": case(config=params(modules=None), says="model.network_config.params.modules is missing"),
    "odd patch": case(config=params(patch_size=[2, 2]), says="params.patch_size: got [2, 2]"),
    "no such way to compile": case(
        config={"model": {"compile_model": "some"}}, says="compile_model: got 'some'; expected true, false or auto"
    ),
    # Limits of the model
    "even frames": case("--sampling_num_frames", "4", says="this model takes an odd number of latent frames up to 3"),
    "too long": case("--sampling_num_frames", "7", says="latent frames up to 3"),
    "odd size": case("--sampling_image_size", "32", "50", says="width 50 does not fit; this model takes multiples"),
    "too large": case("--sampling_image_size", "320", "48", says="height 320 does not fit"),
    "images for text-to-video": case("--image2video", says="this is a text-to-video model"),
    "image-to-video without": case("--no-image2video", i2v=True, says="set image2video: true"),
    "latent channels": case("--latent_channels", "8", says="latent_channels: got 8; this model has 16"),
    "an adapter without LoRA": case("--lora_load", "{folder}/there", says="use the '_lora' variant"),
    # Files
    "no checkpoint": case("--load", "{folder}/gone", says="gone does not exist"),
    "no load": case(config={"args": {"load": None}}, says="load: missing"),
    "no T5": case(
        config={"model": {"conditioner_config": {"params": {"emb_models": [
            {"target": "sgm.modules.encoders.modules.FrozenT5Embedder", "params": {"model_dir": "gone"}}
        ]}}}},
        says="model.conditioner_config.params.emb_models.0.params.model_dir: gone does not exist",
    ),
    "no VAE": case(
        config={"model": {"first_stage_config": {"params": {"ckpt_path": "gone"}}}},
        says="ckpt_path: gone does not exist",
    ),
    "a number for the VAE": case(
        config={"model": {"first_stage_config": {"params": {"ckpt_path": 7}}}}, says="ckpt_path: 7 does not exist"
    ),
    "no VAE at all": case(
        config={"model": {"first_stage_config": {"params": {"ckpt_path": None}}}}, says="ckpt_path: missing"
    ),
    "no prompt file": case("--input_file", "{folder}/gone.txt", says="gone.txt: No such file"),
    "no input_file": case("--input_file", "", says="input_file: missing"),
    "no prompt": case(prompts="\n\n", says="holds no prompt"),
    "no image": case(i2v=True, says="needs an image: prompt@@image_path"),
    "missing image": case(prompts="a boat@@gone.png", i2v=True, says="line 1: image gone.png does not exist"),
    "image unasked": case(prompts="a boat@@there", says="this is a text-to-video model"),
    "sheet no png": case("--contact_sheet", "a.jpg", says="contact_sheet: got a.jpg; expected a name that ends"),
    "previews of latents": case("--looping_previews", "--only_save_latents", says="looping_previews: it needs videos"),
    "sheet of latents": case("--contact_sheet", "a.png", "--only_save_latents", says="out with only_save_latents"),
    "sheet in a file": case("--contact_sheet", "{folder}/there/a.png", says="there is not a folder"),
    "output a file": case("--output_dir", "{folder}/there", says="there is not a folder"),
    "output exists": case("--output_dir", "{folder}/made", says="000000.mp4 exists; give --overwrite"),
}  # fmt: skip
WARNINGS = {"no prompt": 2}  # lines beside the error: one for each of its empty lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad_input")
    (folder / "there").touch()
    (folder / "binary").write_bytes(bytes(range(128, 256)))
    (folder / "empty.yaml").write_text("args: {}\n")
    (folder / "model_text.yaml").write_text("model: text\n")
    video = folder / "made" / "0_a_boat" / "0" / "000000.mp4"
    video.parent.mkdir(parents=True)
    video.touch()
    for name in ("cogvideox_tiny", "cogvideox_tiny_i2v"):
        config = load_configs([ROOT / "configs" / "tiny" / f"{name}.yaml"])
        config["args"]["load"] = str(folder / "there")
        config["model"]["first_stage_config"]["params"]["ckpt_path"] = str(folder / "there")
        config["model"]["conditioner_config"]["params"]["emb_models"][0]["params"]["model_dir"] = str(folder)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


def folder_of(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "_").replace("=", "")


def command(folder: Path, name: str) -> list[str]:
    case, own = CASES[name], folder_of(folder, name)
    own.mkdir()
    (own / "prompts.txt").write_text(case["prompts"])
    model = folder / ("cogvideox_tiny_i2v.yaml" if case["i2v"] else "cogvideox_tiny.yaml")
    base = ["--base", str(model)]
    if case["config"] is not None:
        text = case["config"] if isinstance(case["config"], str) else yaml.safe_dump(case["config"])
        (own / "change.yaml").write_text(text)
        base.append(str(own / "change.yaml"))
    given = [argument.format(folder=folder) for argument in case["arguments"]]
    if "--base" in given or name == "no --base":
        base = []
    return [*base, "--input_file", str(own / "prompts.txt"), "--output_dir", str(own / "videos"), *given]


@pytest.fixture(scope="module")
def results(folder) -> dict[str, tuple[int, str, bool]]:
    """Return for each case the exit code, the log, and whether PyTorch was imported."""
    commands = [command(folder, name) for name in CASES]
    process = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "sat")},
    )
    assert process.returncode == 0, process.stderr
    return dict(zip(CASES, json.loads(process.stdout), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_written(results, folder, name):
    code, logged, torch_imported = results[name]
    lines = logged.splitlines()
    assert code == 2
    assert len(lines) == 1 + WARNINGS.get(name, 0), logged
    assert lines[-1].startswith("error: ")
    assert CASES[name]["says"] in lines[-1]
    assert not torch_imported
    assert [path.name for path in folder_of(folder, name).iterdir() if path.suffix != ".yaml"] == ["prompts.txt"]


def run_command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "sat" / "sample_video.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)


def test_the_process_ends_with_the_code_and_the_line():
    result = run_command("--base", "gone.yaml")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: configuration gone\.yaml: No such file or directory.*\n", result.stderr)


def test_every_process_of_a_launcher_stops_at_a_mistake_without_waiting_for_the_others(folder):
    """This process is the second of two without a first; the existing output is the first's."""
    (folder / "p.txt").write_text("a boat\nanother\n")
    result = run_command(
        *("--base", folder / "cogvideox_tiny.yaml", "--input_file", folder / "p.txt", "--output_dir", folder / "made"),
        **{"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
    )
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "000000.mp4 exists" in result.stderr


def test_prompts_are_typed_into_one_process(folder):
    result = run_command("--base", folder / "cogvideox_tiny.yaml", "--input_type", "cli", WORLD_SIZE="2")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "without torchrun" in result.stderr


def test_help_names_every_argument_and_needs_no_pytorch():
    code = "import sys, sample_video\ntry: sample_video.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "sat")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    for name in ("--base", "--seed", "--offload {none,stage,sequential}", "--lora_scale", "--no-bf16"):
        assert name in result.stdout
