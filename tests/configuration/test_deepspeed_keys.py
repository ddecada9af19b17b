"""Test that the tables hold DeepSpeed's keys, and other versions are asked for their own."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from cogvideox_sat.configuration import deepspeed_keys
from cogvideox_sat.configuration.deepspeed_keys import VERSION, installed_keys, told_keys

ROOT = Path(__file__).parents[2]
# Run in a separate process, since DeepSpeed sets up logging.
COMPARE = """
from cogvideox_sat.configuration.deepspeed_keys import KEYS, MODELS, SECTION_KEYS, told_keys
for place in MODELS:
    assert told_keys(place) == SECTION_KEYS[place], (place, told_keys(place) ^ SECTION_KEYS[place])
for place in ("optimizer", "scheduler", "activation_checkpointing"):
    assert SECTION_KEYS[place] <= told_keys(place), (place, SECTION_KEYS[place] - told_keys(place))
assert {"train_batch_size", "gradient_clipping", "fp16"} <= told_keys("") & KEYS
"""
REFUSE = """
import sys
from cogvideox_sat.configuration.deepspeed import check_deepspeed_config
from sgm.errors import UserError
section = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam", "params": {"lr": 0.1}}}
for wrong in ({"xyzzy": 1}, {"zero_optimization": {"xyzzy": 1}}, {"fp16": {"xyzzy": 1}}):
    try:
        check_deepspeed_config(section | wrong)
    except UserError as error:
        assert "unknown key 'xyzzy'" in str(error)
    else:
        raise AssertionError(wrong)
assert not {"torch", "deepspeed"} & set(sys.modules)
"""


def run(code: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = ['.', 'sat']\n{code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.skipif(version("deepspeed") != VERSION, reason="the tables are of another DeepSpeed, which is then asked")
def test_the_tables_are_complete():
    run(COMPARE)


@pytest.mark.skipif(version("deepspeed") != VERSION, reason="the tables are of another DeepSpeed, which is then asked")
def test_a_mistake_is_named_without_importing_anything():
    run(REFUSE)


@pytest.fixture
def another(monkeypatch):
    """Provide a DeepSpeed of another version, with one model, a field and constants."""
    model = SimpleNamespace(model_fields={"warp": SimpleNamespace(alias="stage4_warp")})
    for name, content in {
        "zero.config": {"DeepSpeedZeroConfig": model},
        "precision_config": {},  # a key of an older version
        "constants": {"TIME_TRAVEL": "time_travel", "TIME_TRAVEL_DEFAULT": False, "lower": "no"},
        "activation_checkpointing.config": {"ACT_SKIP": "skip"},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"deepspeed.runtime.{name}", module)
    monkeypatch.setattr(deepspeed_keys, "version", lambda name: "99.0")
    installed_keys.cache_clear()
    yield
    installed_keys.cache_clear()


def test_another_version_is_asked(another):
    assert installed_keys("zero_optimization") == {"warp", "stage4_warp"}
    assert installed_keys("") == installed_keys("fp16") == installed_keys("optimizer") == {"time_travel"}
    assert installed_keys("activation_checkpointing") == {"skip"}


def test_one_that_cannot_be_imported_tells_nothing(another, monkeypatch):
    def fail(name: str) -> None:
        raise RuntimeError("built for another PyTorch")

    monkeypatch.setattr(deepspeed_keys, "import_module", fail)
    assert told_keys("zero_optimization") == told_keys("") == frozenset()
