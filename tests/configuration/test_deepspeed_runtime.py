"""Test that a checked section is completed for a run as DeepSpeed understands it."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest

from cogvideox_sat.configuration.deepspeed import check_deepspeed_config, enabled_precision
from cogvideox_sat.configuration.deepspeed_runtime import BatchSizes, batch_sizes, runtime_config
from sgm.errors import UserError

ROOT = Path(__file__).parents[2]
ADAM = {"type": "Adam", "params": {"lr": 1e-3}}


def checked(**changes) -> dict:
    return check_deepspeed_config({"train_micro_batch_size_per_gpu": 1, "optimizer": copy.deepcopy(ADAM), **changes})


@pytest.mark.slow
def test_deepspeed_itself_takes_what_passes():
    """DeepSpeed's own parser reads the completed section.

    It runs in a separate process, since it sets up logging.
    """
    code = (
        "import sys; sys.path[:0] = ['.', 'sat']\n"
        "from deepspeed.runtime.config import DeepSpeedConfig\n"
        "from cogvideox_sat.configuration.files import load_configs\n"
        "from cogvideox_sat.configuration.deepspeed import check_deepspeed_config\n"
        "from cogvideox_sat.configuration.deepspeed_runtime import runtime_config\n"
        "section = load_configs(['configs/sft.yaml'])['deepspeed']\n"
        "for stage in range(4):\n"
        "    section['zero_optimization'].update(stage=stage, cpu_offload=stage > 0)\n"
        "    section['zero_optimization'].pop('offload_optimizer', None)\n"
        "    for precision in ('fp16', 'bf16', 'fp32'):\n"
        "        config = DeepSpeedConfig(runtime_config(check_deepspeed_config(section), precision))\n"
        "        assert config.zero_optimization_stage == max(stage, int(precision != 'fp32'))\n"
        "        assert (config.float16_config.enabled, config.bfloat16_config.enabled) == (\n"
        "            precision == 'fp16', precision == 'bf16')\n"
        "        assert config.zero_allow_untested_optimizer and not config.zero_force_ds_cpu_optimizer\n"
        "        offload = config.zero_config.offload_optimizer\n"
        "        assert (offload is not None and offload.device == 'cpu') == (stage > 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("micro", "accumulation", "total", "processes", "expected"),
    [
        (2, None, None, 4, BatchSizes(2, 1, 8)),
        (2, 3, None, 4, BatchSizes(2, 3, 24)),
        (2, None, 24, 4, BatchSizes(2, 3, 24)),
        (None, 3, 24, 4, BatchSizes(2, 3, 24)),
        (None, None, 24, 4, BatchSizes(6, 1, 24)),
        (2, 3, 24, 4, BatchSizes(2, 3, 24)),
        (2, 3, 24, 3, None),
        (2, None, 25, 4, None),
        (2, None, 4, 4, None),
        (None, None, 3, 4, None),
    ],
)
def test_batch_sizes(micro, accumulation, total, processes, expected):
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    given = zip(names, (micro, accumulation, total), strict=True)
    config = {name: value for name, value in given if value is not None}
    if expected:
        assert batch_sizes(config, processes) == expected
        return
    with pytest.raises(UserError, match=f"train_batch_size {total} is not .* {processes} data-parallel processes"):
        batch_sizes(config, processes)


def test_the_run_decides_the_precision_and_half_precision_runs_under_zero():
    config = checked(fp16={"enabled": True, "loss_scale_window": 400})
    assert enabled_precision(config) == "fp16"
    assert enabled_precision(checked()) is None
    runtime = runtime_config(config, "bf16")
    assert (runtime["fp16"]["enabled"], runtime["bf16"]["enabled"]) == (False, True)
    assert runtime["fp16"]["loss_scale_window"] == 400
    assert runtime["zero_optimization"]["stage"] == 1
    assert runtime_config(config, "fp32")["zero_optimization"]["stage"] == 0
    assert "zero_optimization" not in config and config["fp16"]["enabled"]


@pytest.mark.parametrize(("stage", "precision"), [(2, "fp32"), (0, "bf16")])
def test_muon_gets_whole_matrices_or_a_refusal(stage, precision):
    muon = {"type": "sgm.muon.Muon", "params": {"lr": 0.02, "momentum": 0.9}}
    config = checked(optimizer=muon, zero_optimization={"stage": stage})
    with pytest.raises(UserError, match="needs whole matrices"):
        runtime_config(config, precision)
    assert runtime_config(checked(optimizer=muon), "fp32")["optimizer"] == muon
    with pytest.raises(UserError, match="adam_lr_factor"):
        checked(optimizer={"type": "sgm.muon.Muon", "params": {"lr": 0.02, "adam_lr": 0.9}})
