"""The installed DeepSpeed has all that is taken from it beyond its documentation, and a name that is gone is told."""

import re
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from cogvideox_sat.training import deepspeed_adapter
from cogvideox_sat.training.deepspeed_adapter import (
    CHECKED,
    ENGINE,
    LOSS_SCALE,
    OPTIMIZERS,
    PARTITIONED,
    check,
    loss_scale,
    set_loss_scale,
)
from sgm.errors import UserError
from small_engines import arguments, build, linear_as_before  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("linear_as_before")

ROOT = Path(__file__).parents[2]
BF16 = {"bf16": {"enabled": True}}
# Stage, dtype and section, by the class of the optimizer that DeepSpeed then takes.
ENGINES = {
    "EmaAdam": (0, torch.float32, {}),
    "DeepSpeedZeroOptimizer": (2, torch.float32, {}),
    "DeepSpeedZeroOptimizer_Stage3": (3, torch.float32, {}),
    "BF16_Optimizer": (1, torch.bfloat16, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
}


@pytest.mark.parametrize("kind", ENGINES)
def test_the_installed_version_has_all_that_is_used(kind):
    """`initialize` checks each engine, and its UserError names what is gone."""
    stage, dtype, section = ENGINES[kind]
    engine = build(arguments(stage, **section), dtype)
    assert type(engine.optimizer).__name__ == kind, "the class has another name now: see deepspeed_adapter.OPTIMIZERS"
    check(engine)


def test_every_optimizer_in_the_tables_is_tried():
    assert OPTIMIZERS.keys() < ENGINES.keys()


def stand_in(**without: str) -> SimpleNamespace:
    """An engine of ZeRO-2 that has all that is used; `without` takes an attribute of one of its parts."""
    scaler = DynamicLossScaler(256.0, scale_window=1000, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False)
    optimizer = type("DeepSpeedZeroOptimizer", (), {})()
    vars(optimizer).update(dict.fromkeys(OPTIMIZERS["DeepSpeedZeroOptimizer"]), loss_scaler=scaler)
    engine = SimpleNamespace(**dict.fromkeys(ENGINE), module=torch.nn.Linear(1, 1))
    engine.optimizer = optimizer
    for part, name in without.items():
        delattr({"engine": engine, "optimizer": optimizer, "scaler": scaler}[part], name)
    return engine


@pytest.mark.parametrize(
    ("part", "name", "says"),
    [
        *(("engine", name, f"{name} of the engine") for name in ENGINE if name != "optimizer"),
        *(("optimizer", name, f"{name} of DeepSpeedZeroOptimizer") for name in OPTIMIZERS["DeepSpeedZeroOptimizer"]),
        *(("scaler", name, f"{name} of the loss scale") for name in LOSS_SCALE),
    ],
)
def test_what_is_gone_is_named(part, name, says):
    check(stand_in())
    with pytest.raises(UserError, match=f"lacks {says}; install deepspeed=={CHECKED}"):
        check(stand_in(**{part: name}))


def test_an_engine_without_its_optimizer_or_parts_of_parameters_is_told_too(monkeypatch):
    with pytest.raises(UserError, match="optimizer of the engine"):
        check(stand_in(engine="optimizer"))
    engine = stand_in()
    engine.module.weight.ds_id = 1
    with pytest.raises(UserError, match="ds_shape of a parameter, ds_tensor of a parameter"):
        check(engine)
    monkeypatch.setattr(deepspeed_adapter.deepspeed, "ops", SimpleNamespace())
    with pytest.raises(UserError, match="__compatible_ops__"):
        check(stand_in())


def test_a_loss_scale_goes_on_where_it_was():
    engine, other = stand_in(), stand_in()
    scaler = engine.optimizer.loss_scaler
    for overflow in (False, True, True, False):
        scaler.update_scale(overflow)
    set_loss_scale(other, loss_scale(engine))
    assert loss_scale(other) == loss_scale(engine)
    assert loss_scale(other)["cur_iter"] == 4
    other.optimizer.loss_scaler = LossScaler(scale=8.0)
    set_loss_scale(other, loss_scale(engine))
    assert (loss_scale(other), other.optimizer.loss_scaler.cur_scale) == ({}, 8.0)


def test_no_other_module_names_what_is_not_documented():
    """But for the name of a module in stored files."""
    names = {*ENGINE, *LOSS_SCALE, *PARTITIONED, *chain(*OPTIMIZERS.values())}
    keys = {"optimizer", "zero_optimization", "overflow", "loss_scaler", "check_grad_overflow"}  # and words of files
    pattern = re.compile(
        rf"\b({'|'.join(sorted(names - keys))})\b|deepspeed\.ops\b|\.(overflow|loss_scaler|check_grad_overflow)\b"
        r"|\.zero_optimization\("
    )
    found = {
        f"{path.name}: {match[0]}"
        for folder in ("sat", "sgm", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "deepspeed_adapter.py"
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    }
    assert found == {"weights.py: .loss_scaler"}
