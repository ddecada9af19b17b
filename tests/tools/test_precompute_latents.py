"""The command's mistakes come before PyTorch's import, and a killed run resumes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import processes
from cogvideox_sat.clips.latent_dataset import LatentDataset
from tool_runs import assert_told_before_pytorch
from tools.precompute_latents import main
from training_clips import write_dataset

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "precompute_latents.py"


# Is killed while it writes its second shard.
KILLED = """
import os, signal, sys
from cogvideox_sat.training import latent_cache_shards
from tools.precompute_latents import main

save = latent_cache_shards.save
latent_cache_shards.SHARD_SAMPLES = 2

def save_and_die(tensors, metadata):
    if "4.text" in tensors or "2.text" in tensors:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(tensors, metadata)

latent_cache_shards.save = save_and_die
main(sys.argv[1:])
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "sat")]), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """Write clips to `data`, and the configurations `2b.yaml`, `5b_i2v.yaml`."""
    folder = tmp_path_factory.mktemp("precompute")
    write_dataset(folder / "data", 5, frames=12)
    sections = {
        "args": {"train_data": [str(folder / "data")], "num_workers": 1, "device": "cpu"},
        "data": {
            "target": "data_video.SFTDataset",
            "params": {"video_size": [32, 48], "fps": 8, "max_num_frames": 5, "skip_frms_num": 0},
        },
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "sat.ops.FusedEmaAdam", "params": {"lr": 1e-3}},
        },
    }
    for family in ("2b", "5b_i2v"):
        tiny.variant(family, folder / f"{family}.yaml", **sections)
    (folder / "cache").mkdir()
    (folder / "cache" / "cache.json").write_text("{}")
    for name, model in (
        ("no_vae", {"first_stage_config": {"params": {"ckpt_path": "/nowhere/vae.pt"}}}),
        ("latent_input", {"latent_input": True}),
        ("large", None),
    ):
        content = {"include": str(folder / "2b.yaml"), **({"model": model} if model else {})}
        if model is None:
            content["data"] = {"params": {"video_size": [480, 720]}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


CASES = {
    "no output": (["--base", "{folder}/2b.yaml"], "--output: missing; name the folder of the cache"),
    "no files": (["--output", "x"], "--base: missing"),
    "unknown store": (["--store", "pixels"], "--store: invalid choice: 'pixels'"),
    "unknown argument": (["--trane_data", "x"], "unknown argument --trane_data; did you mean --train_data?"),
    "no data": (["--train_data", "/nowhere"], "train_data: /nowhere does not exist"),
    "latents": (["--train_data", "{folder}/cache"], "train_data is already a cache of latents"),
    "variants of nothing": (["--image_variants", "2"], "image_variants is for image-to-video models"),
    "no variants": (["--base", "{folder}/5b_i2v.yaml", "--image_variants", "0"], "it must be at least 1"),
    "shared network": (
        ["--model_parallel_size", "2"],
        "encoding does not use the network; leave model_parallel_size at 1",
    ),
    "no VAE": (["--base", "{folder}/no_vae.yaml"], "/nowhere/vae.pt does not exist"),
    "latent input": (["--base", "{folder}/latent_input.yaml"], "so that nothing is left to encode"),
    "weights": (["--train_data_weights", "1"], "a cache does not record which data set a clip is from"),
    "an inspection": (["--inspect_data"], "inspect_data: give it to sat/train_video.py"),
    "too large": (["--base", "{folder}/large.yaml"], "data.params.video_size: height 480 does not fit"),
}


def test_mistakes_are_one_line_before_pytorch_comes_in(folder):
    mistakes = {}
    for name, (arguments, says) in CASES.items():
        given = [argument.format(folder=folder) for argument in arguments]
        if "--base" not in given and name != "no files":
            given += ["--base", f"{folder}/2b.yaml"]
        if "--output" not in given and name != "no output":
            given += ["--output", f"{folder}/latents"]
        mistakes[name] = given, says
    assert_told_before_pytorch("precompute_latents", mistakes)
    assert not (folder / "latents").exists()


def test_help_needs_no_pytorch():
    command = [sys.executable, "-X", "importtime", str(TOOL), "--help"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    for flag in ("--output", "--store", "--dtype", "--image_variants", "torchrun"):
        assert flag in process.stdout
    assert " torch\n" not in process.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on(folder, monkeypatch):
    """A killed and restarted run leaves the files of an uninterrupted one."""
    base = ["--base", str(folder / "5b_i2v.yaml"), "--bf16", "--image_variants", "2", "--output"]
    process = processes.run(["-c", KILLED, *base, folder / "killed"], env=environment())
    assert process.returncode == -signal.SIGKILL, process.stderr
    left = sorted(path.name for path in (folder / "killed").iterdir())
    assert left[1:] == ["cache.json", "rank0000-00000.safetensors"] and left[0].endswith(".part")

    from cogvideox_sat.training import latent_cache_shards

    monkeypatch.setattr(latent_cache_shards, "SHARD_SAMPLES", 2)
    for name in ("killed", "whole"):
        assert main([*base, str(folder / name)]) == 0
    killed, whole = ({path.name: path.read_bytes() for path in (folder / n).iterdir()} for n in ("killed", "whole"))
    assert killed == whole and len(whole) == 4
    dataset = LatentDataset([folder / "killed"])
    assert len(dataset) == 5 and dataset.encodings[folder / "killed"]["dtype"] == "bfloat16"
    assert dataset.encodings[folder / "killed"]["image_variants"] == 2
