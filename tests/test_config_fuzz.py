"""For any configuration a command ends in time with exit code 0, 1 or 2.

It prints no traceback, leaves no half-written files, and does not run anything that the configuration names. See
`--fuzz_cases` in `conftest.py`.
"""

import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import processes
from cogvideox_sat.configuration.files import load_configs
from config_mutations import CANARY, evil_module, mutated
from training_clips import write_dataset
from training_runs import ROOT

pytestmark = pytest.mark.slow

COMMANDS = ("sample_video", "train_video", "train_vae")
# Seconds of processor time, independent of other processes; and bytes of a file.
LIMITS = {"RLIMIT_CPU": 20, "RLIMIT_FSIZE": 2**28}
PATIENCE = 240  # seconds by the clock, for processes that wait
SEED = 18


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Write a working configuration for each command, with all sections, that takes seconds."""
    folder = tmp_path_factory.mktemp("fuzz")
    data = str(write_dataset(folder / "data", clips=2, frames=9, sizes=[(64, 64)]))
    (folder / "prompts.txt").write_text("a red circle\n")
    configs = ROOT / "configs"

    def loaded(*names: str) -> dict[str, Any]:
        config = dict(load_configs([configs / name for name in names]))
        for _, node in _mappings(config):
            for name, value in node.items():
                if isinstance(value, str) and value.startswith("assets/"):
                    node[name] = str(ROOT / value)
        return config

    sampling = loaded("tiny/cogvideox_tiny.yaml", "inference.yaml")
    sampling["args"] |= {"input_file": str(folder / "prompts.txt"), "output_dir": "out", "device": "cpu"}
    sampling["args"] |= {"sampling_num_steps": 1, "sampling_num_frames": 1, "only_save_latents": False}
    training = loaded("tiny/cogvideox_tiny_lora.yaml", "tiny/sft.yaml")
    short = {"train_data": [data], "num_workers": 0, "device": "cpu", "tensorboard": False, "save_interval": 100}
    training["args"] |= {**short, "save": "out", "train_iters": 1, "valid_data": [], "log_interval": 1}
    training["data"]["params"] |= {"video_size": [64, 64], "max_num_frames": 1}
    training["deepspeed"] |= {"train_micro_batch_size_per_gpu": 1}
    training["deepspeed"].pop("torch_autocast", None)
    vae = loaded("tiny/vae_images.yaml")
    vae["args"] |= {**short, "save": "out", "train_iters": 1, "valid_data": [], "batch_size": 1}
    vae["data"]["params"] |= {"video_size": [64, 64], "max_num_frames": 1}
    return {"sample_video": sampling, "train_video": training, "train_vae": vae}


def _mappings(node: Any, key: tuple = ()):
    if isinstance(node, dict):
        yield key, node
    for name, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from _mappings(child, (*key, name))


def run(command: str, folder: Path) -> tuple[int, str]:
    """Return the exit code and the output of a command that reads `case.yaml` in a folder."""
    words = [ROOT / "sat" / f"{command}.py", "--base", "case.yaml"]
    done = processes.run(words, cwd=folder, stderr=subprocess.STDOUT, limits=LIMITS, timeout=PATIENCE)
    return done.returncode, done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_the_configurations_themselves_work(command, bases, tmp_path):
    (tmp_path / "case.yaml").write_text(yaml.safe_dump(bases[command]))
    code, log = run(command, tmp_path)
    assert code == 0, log
    assert any((tmp_path / "out").rglob("*"))


def test_a_changed_configuration_ends_well(fuzz_case, bases, tmp_path):
    source = random.Random(f"{SEED}:{fuzz_case}")
    command = COMMANDS[fuzz_case % len(COMMANDS)]
    text, key = mutated(bases[command], source)
    (tmp_path / "case.yaml").write_text(text)
    evil_module(tmp_path)
    code, log = run(command, tmp_path)
    complaint = f"case {fuzz_case}: {command}, {key} changed: exit code {code}\n{log}"
    assert code in (0, 1, 2), complaint
    assert "Traceback" not in log, complaint
    assert not (tmp_path / CANARY).exists(), complaint
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(lines) == (code == 2), complaint
    if code == 2:
        assert "case.yaml" in lines[0], complaint
        assert not any(path.is_file() for path in (tmp_path / "out").rglob("*")), complaint
    assert not any(path.name.endswith((".part", ".tmp")) for path in tmp_path.rglob("*")), complaint
    shutil.rmtree(tmp_path, ignore_errors=True)
