"""The schedules equal reference values, drive LambdaLR, and continue past their end."""

import io
import json
import logging

import pytest
import torch

from sgm import lr_scheduler
from sgm.errors import UserError
from sgm.util import instantiate_from_config
from support import REFERENCE

CASES = json.loads((REFERENCE / "lr_schedulers.json").read_text())
CYCLES = {
    "warm_up_steps": [2, 1],
    "f_min": [0.1, 0.2],
    "f_max": [1.0, 0.5],
    "f_start": [0, 0],
    "cycle_lengths": [10, 5],
}


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    case = CASES[name]
    schedule = instantiate_from_config({"target": f"sgm.lr_scheduler.{name}", "params": case["params"]})
    for step, value in zip(case["steps"], case["values"], strict=True):
        assert schedule(step) == pytest.approx(value, rel=1e-12, abs=0)
        assert schedule.schedule(step) == schedule(step)


@pytest.mark.parametrize("name", ["LambdaWarmUpCosineScheduler2", "LambdaLinearScheduler"])
def test_after_the_last_cycle_the_factor_stays(name):
    schedule = getattr(lr_scheduler, name)(**CYCLES)
    assert schedule(15) == schedule(16) == schedule(10**9) == 0.2


@pytest.mark.parametrize("name", CASES)
def test_drives_an_optimizer_and_resumes_from_a_checkpoint_read_without_running_code(name):
    case = CASES[name]

    def build():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        schedule = getattr(lr_scheduler, name)(**case["params"])
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    def rates(optimizer, scheduler, steps: int) -> list[float]:
        out = []
        for _ in range(steps):
            out.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return out

    optimizer, scheduler = build()
    whole = rates(optimizer, scheduler, 120)
    assert whole == [2.0 * scheduler.lr_lambdas[0](step) for step in range(120)]

    optimizer, scheduler = build()
    start = rates(optimizer, scheduler, 55)
    buffer = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], buffer)
    buffer.seek(0)
    resumed, scheduler = build()
    for each, state in zip((resumed, scheduler), torch.load(buffer, weights_only=True), strict=True):
        each.load_state_dict(state)
    assert start + rates(resumed, scheduler, 65) == whole


def test_logs_the_factor_as_often_as_asked(caplog):
    schedule = lr_scheduler.LambdaLinearScheduler(**CYCLES, verbosity_interval=4)
    with caplog.at_level(logging.INFO, "sgm.lr_scheduler"):
        for step in range(9):
            schedule(step)
    assert [record.args[0] for record in caplog.records] == [0, 4, 8]


def test_what_does_not_fit_is_said_in_one_line():
    with pytest.raises(UserError, match=r"LambdaLinearScheduler: each list needs one value per cycle.*'f_min': 3"):
        lr_scheduler.LambdaLinearScheduler(**{**CYCLES, "f_min": [1, 2, 3]})
    with pytest.raises(UserError, match="a warm-up: got 10; it must be at least 0 and shorter"):
        lr_scheduler.LambdaWarmUpCosineScheduler(10, lr_min=0.1, lr_max=1, lr_start=0, max_decay_steps=10)
    with pytest.raises(UserError, match="a warm-up: got -1; it must be at least 0"):
        lr_scheduler.LambdaWarmUpCosineScheduler2(**{**CYCLES, "warm_up_steps": [-1, 0]})


def test_what_was_returned_last_and_where_a_step_is():
    schedule = lr_scheduler.LambdaWarmUpCosineScheduler2(**CYCLES)
    assert schedule.last_f == schedule.last_lr == 0.0
    assert [schedule.find_in_interval(n) for n in (0, 9, 10, 11, 15, 16, 1000)] == [0, 0, 0, 1, 1, 1, 1]
    for n in (1, 12, 40):
        assert schedule.schedule(n, epoch=3) == schedule(n, anything=None) == schedule.last_f == schedule.last_lr
    one = lr_scheduler.LambdaWarmUpCosineScheduler(2, 0.1, 1.0, 0.0, 10)
    assert one(5) == one.last_lr != 0
