"""The memory of a run is told without weights and data, and is what the run logs."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cogvideox_sat.memory.weightless import WeightlessEngine, module_bytes
from sgm.modules.encoders.modules import FrozenT5Embedder
from sgm.modules.encoders.t5_loading import empty_t5
from tool_runs import error_of
from tools.estimate_memory import main

OFFLOADS = ("none", "stage", "sequential")
ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TINY = (CONFIGS / "tiny" / "cogvideox_tiny_lora.yaml", CONFIGS / "tiny" / "sft.yaml")


def told(capsys, *arguments: object) -> list[str]:
    assert main(["--base", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def gib(line: str) -> float:
    return float(re.search(r": ([\d.]+) GiB", line)[1])


@pytest.mark.slow
def test_released_models_need_what_the_benchmark_tells(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("training_memory")
    lines = told(capsys, CONFIGS / "cogvideox_2b_lora.yaml", CONFIGS / "sft.yaml")
    assert "adapter" in lines[0]
    assert f"{gib(lines[1]):.1f}" == benchmark.cell("cogvideox_2b", True, 1, {})
    assert lines[1].startswith("on latents: expected memory of a process, for 1 x 49 frames of 480x720: ")
    assert gib(lines[2]) > gib(lines[1]) + 10, "the VAE at work on clips of full size"
    assert lines[3].endswith("its size is not known: checkpoints/t5-v1_1-xxl/config.json does not exist")
    divided = told(capsys, CONFIGS / "cogvideox_2b.yaml", CONFIGS / "sft.yaml", "--processes", 8)
    assert f"{gib(divided[1]):.1f}" == benchmark.cell("cogvideox_2b", False, 8, {})


@pytest.mark.slow
def test_arguments_of_training_change_it(capsys):
    lines = told(capsys, *TINY)
    assert len(lines) == 3, "the text encoder is counted"
    recomputed = told(capsys, *TINY, "--checkpoint_activations")
    assert gib(recomputed[1]) < gib(lines[1]) and "activations (recomputed)" in recomputed[1]
    choices = told(capsys, *TINY, "--checkpoint_activations", "auto")[1:4]
    assert [gib(line) for line in choices] == sorted(map(gib, choices), reverse=True) and gib(choices[0]) == gib(
        lines[1]
    )
    for line, mode in zip(choices, ("false", "attention", "true"), strict=True):
        assert line.startswith(f"on latents, if checkpoint_activations: auto takes {mode}: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_without_weights_have_the_size_of_the_loaded_ones(dtype):
    folder = ROOT / "assets" / "tiny" / "t5"
    assert module_bytes(empty_t5(folder, dtype)) == module_bytes(FrozenT5Embedder(str(folder), dtype=dtype))


def test_an_engine_without_weights_has_the_size_of_the_loaded_one(monkeypatch):
    from cogvideox_sat.configuration.files import load_configs
    from cogvideox_sat.engine.parts import PARTS
    from diffusion_video import SATVideoDiffusionEngine

    monkeypatch.chdir(ROOT)
    config = load_configs([CONFIGS / "tiny" / "cogvideox_tiny.yaml", CONFIGS / "inference.yaml"])
    args = SimpleNamespace(model_config=config["model"], load=config["args"]["load"], bf16=True)
    loaded = SATVideoDiffusionEngine(args, parts=PARTS)
    assert module_bytes(WeightlessEngine(args, parts=PARTS)) == module_bytes(loaded)


@pytest.mark.slow
def test_a_configuration_for_sampling(capsys):
    lines = told(capsys, CONFIGS / "tiny" / "cogvideox_tiny.yaml", CONFIGS / "tiny" / "inference.yaml")
    assert [line.split(":")[0] for line in lines[:3]] == ["network", "VAE", "text encoder"]
    assert lines[0] == "network: 10.26 MiB of weights (2.68 M parameters)"
    assert lines[3] == "GiB of the device for 9 frames of 64x64, 1 of them for CUDA itself:"
    assert lines[-1] == "--fit 6GB to 80GB: --offload none --guidance_batch 2"


@pytest.mark.slow
def test_sampling_a_released_model(capsys):
    """A table of stages by --offload, and what --fit picks; with --fit, that alone."""
    files = (CONFIGS / "cogvideox_5b.yaml", CONFIGS / "inference.yaml")
    lines = told(capsys, *files, "--fit", "6GB")
    assert lines[0] == "network: 10.38 GiB of weights (5.57 B parameters)"
    assert lines[2].startswith("text encoder: 8.87 GiB of weights (4.76 B parameters), taken to be T5 v1.1 XXL: ")
    assert lines[3] == "GiB of the device for 49 frames of 480x720, 1 of them for CUDA itself:"
    assert lines[4].split() == ["text", "encoder", "network", "VAE"]
    rows = {" ".join(line.split()[:2]): line.split()[2:] for line in lines[5:-1]}
    none, stage, sequential = ([float(cell) for cell in rows[f"--offload {way}"]] for way in OFFLOADS)
    assert none[1] > stage[1] > sequential[1] and stage[0] > 4 * sequential[0] - 4
    assert re.fullmatch(
        r"--fit 6GB picks --offload sequential --guidance_batch 2 --vae_frames_at_once 4, which takes up to 4\.8 GiB "
        r"\(the VAE takes most\); --offload none --guidance_batch 2 would take 2\d\.\d GiB",
        lines[-1],
    )


@pytest.mark.slow
def test_mistakes_are_one_line(caplog, tmp_path):
    def error(*arguments: object) -> str:
        return error_of(main, caplog, *arguments)

    assert "--base" in error()
    assert "nowhere.yaml" in error("--base", tmp_path / "nowhere.yaml")
    assert "--processes: got 0; it must be at least 1" in error("--base", *TINY, "--processes", 0)
    assert "unknown argument --sede" in error("--base", *TINY, "--sede", 1)
    sampling = ("--base", CONFIGS / "cogvideox_2b.yaml")
    assert "--processes: only fine-tuning takes it" in error(*sampling, "--processes", 2)
    assert "unknown argument --fitt; did you mean --fit?" in error(*sampling, "--fitt", "12GB")
    assert "fit: 12 has no unit; give an amount such as 12GB, or auto" in error(*sampling, "--fit", 12)
    assert "sampling_num_frames: got 14; this model takes" in error(*sampling, "--sampling_num_frames", 14)
    assert "model_parallel_size: got 2; the memory of a network" in error(*sampling, "--model_parallel_size", 2)
    assert "fit: 1GB is too small for this model and size, which take at least 4" in error(*sampling, "--fit", "1GB")
    config = tmp_path / "shared.yaml"
    files = f"include: [{CONFIGS}/cogvideox_2b.yaml, {CONFIGS}/sft.yaml]\n"
    config.write_text(files + "args: {model_parallel_size: 2}\n")
    assert "model_parallel_size: got 2; the memory of a network that processes share" in error("--base", config)
    config.write_text(
        f"include: [{CONFIGS}/cogvideox_2b.yaml, {CONFIGS}/sft.yaml]\ndata: {{params: {{video_size: }}}}\n"
    )
    assert "data.params.video_size: missing" in error("--base", config)
