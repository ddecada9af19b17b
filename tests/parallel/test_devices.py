"""A run uses the requested device and precision, and logs them."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cogvideox_sat.configuration.argument_lists import SamplingArguments, TrainingArguments
from cogvideox_sat.parallel import devices
from sgm.errors import UserError
from support import FP16_PROCESSOR

ROOT = Path(__file__).parents[2]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
CHOOSE = (
    "import logging, sys; logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stdout);"
    "from cogvideox_sat.parallel.devices import choose_device; choose_device(None)"
)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a program of that name, with the given lines of shell, first on PATH."""

    def put(*lines: str) -> None:
        file = tmp_path / "nvidia-smi"
        file.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
        file.chmod(file.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return put


def test_the_log_says_which_device(caplog):
    caplog.set_level("INFO")
    device = devices.choose_device("cpu")
    assert device == torch.device("cpu")
    assert caplog.messages[0].startswith("device: cpu (") and "thread" in caplog.messages[0]
    assert torch.__version__ in caplog.messages[0] and len(caplog.messages) == 1


def test_every_process_says_its_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert devices.device_line(torch.device("cpu")).startswith("device of process 1: cpu (")


def test_determinism_is_left_to_the_commands(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    devices.choose_device("cpu")
    assert torch.backends.cudnn.deterministic is False


@without_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:3"])
def test_a_gpu_that_does_not_exist_is_refused(name):
    with pytest.raises(UserError, match=rf"device: {name} is not available: .*; use --device cpu"):
        devices.choose_device(name)


@without_gpu
def test_a_gpu_that_pytorch_does_not_see_is_a_warning(nvidia_smi, caplog):
    nvidia_smi("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'", "echo 'GPU 1: NVIDIA H100 (UUID: GPU-2)'")
    devices.choose_device(None)
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    line = warning.getMessage()
    assert line.startswith("device: nvidia-smi lists 2 GPUs (NVIDIA H100), but PyTorch does not see any: ")
    assert "the CPU is used" in line and "\n" not in line


@without_gpu
@pytest.mark.parametrize(
    "lines",
    [
        ["exit 9"],
        ["echo 'No devices were found'", "exit 6"],
        ["echo 'GPU 0: NVIDIA A100 (UUID: GPU-1)'", "echo '  MIG 1g.10gb Device 0: (UUID: MIG-1)'"],
        [],
    ],
    ids=["no driver", "no GPU", "divided", "silent"],
)
def test_no_warning_where_there_is_no_gpu(nvidia_smi, caplog, lines):
    nvidia_smi(*lines)
    devices.choose_device(None)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@without_gpu
def test_no_warning_for_those_who_want_the_cpu(nvidia_smi, caplog, monkeypatch):
    nvidia_smi("echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'")
    devices.choose_device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    devices.choose_device(None)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_some_of_several_gpus(nvidia_smi, caplog, monkeypatch):
    nvidia_smi('for i in 0 1 2 3; do echo "GPU $i: NVIDIA L4 (UUID: GPU-$i)"; done')
    devices.warn_of_unseen_gpus(seen=4)
    assert not caplog.records
    devices.warn_of_unseen_gpus(seen=3)
    assert caplog.messages == ["device: nvidia-smi lists 4 GPUs (NVIDIA L4), PyTorch sees 3 of them"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    devices.warn_of_unseen_gpus(seen=3)
    assert len(caplog.messages) == 1


@pytest.mark.slow
@without_gpu
@pytest.mark.parametrize("trap", ["", "trap '' TERM INT HUP"], ids=["", "ignores signals"])
def test_an_nvidia_smi_that_hangs_costs_seconds(nvidia_smi, monkeypatch, trap):
    nvidia_smi(trap, "sleep 60")
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "sat")])}
    process = subprocess.run(
        [sys.executable, "-c", CHOOSE], capture_output=True, text=True, env=environment, timeout=50
    )
    assert process.returncode == 0 and time.monotonic() - began < 40
    assert "nvidia-smi does not answer within 5 s" in process.stdout


# ---------------------------------------------------------------- precision


def pretend(monkeypatch, **supported: bool) -> None:
    monkeypatch.setattr(
        devices, "computes_fast", lambda dtype, device: supported[str(dtype).removeprefix("torch.")], raising=True
    )


@pytest.mark.parametrize(
    ("fp16", "bf16", "expected", "says"),
    [
        (True, True, (True, False), None),
        (False, True, (False, True), "the arithmetic is bfloat16"),
        (False, False, (False, False), "the arithmetic is float32"),
    ],
)
def test_fp16_where_it_is_slow(monkeypatch, caplog, fp16, bf16, expected, says):
    caplog.set_level("INFO")
    pretend(monkeypatch, float16=fp16, bfloat16=bf16)
    for given in (SamplingArguments(fp16=True), TrainingArguments(fp16=True, deepspeed_config={})):
        args = devices.settle_precision(given, torch.device("cpu"))
        assert (args.fp16, args.bf16) == expected and given.fp16
        if says and hasattr(args, "deepspeed_config"):
            assert [args.deepspeed_config[name]["enabled"] for name in ("fp16", "bf16")] == list(expected)
    assert len(caplog.messages) == (2 if says else 0) and all(says in message for message in caplog.messages)


@pytest.mark.parametrize("given", [{}, {"bf16": True}])
def test_other_precisions_stay_as_they_are(monkeypatch, given):
    pretend(monkeypatch, float16=False, bfloat16=False)
    args = SamplingArguments(**given)
    assert devices.settle_precision(args, torch.device("cpu")) is args
    for dtype in (torch.float32, torch.bfloat16):
        assert devices.fast_dtype(dtype, torch.device("cpu")) == dtype


def test_this_processor_is_asked():
    assert devices.computes_fast(torch.float16, torch.device("cpu")) == FP16_PROCESSOR
    assert devices.computes_fast(torch.float16, torch.device("cuda")) is True
