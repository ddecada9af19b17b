"""Steps that are left out, counted, and too many of them."""

import logging

import pytest

from cogvideox_sat.runs.skipped_steps import SkippedSteps, check_finite
from sgm.errors import UserError

LOG = logging.getLogger(__name__)


def test_they_are_counted_and_told(caplog):
    skipped = SkippedSteps(3, "the learning rate", LOG)
    skipped.left_out(5, finite_loss=True)
    skipped.left_out(6, finite_loss=False)
    assert caplog.messages == [
        "step 5 is left out: the gradients are not finite (1 in a row, 1 in all)",
        "step 6 is left out: the loss is not finite (2 in a row, 2 in all)",
    ]
    skipped.made()
    skipped.left_out(8, finite_loss=True)
    assert (skipped.in_a_row, skipped.in_all) == (1, 3)


def test_too_many_in_a_row_end_the_run_also_when_it_was_resumed_between():
    skipped = SkippedSteps(3, "the learning rate", LOG)
    skipped.left_out(1, finite_loss=True)
    skipped.left_out(2, finite_loss=True)
    resumed = SkippedSteps(3, "the learning rate", LOG, skipped.state())
    with pytest.raises(UserError, match="3 steps in a row had no finite loss and gradients; lower the learning rate"):
        resumed.left_out(3, finite_loss=True)


def test_values_that_must_be_finite():
    check_finite({"loss": 1.0, "psnr": 0.0}, 7, "the rate")
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(UserError, match="psnr is not finite at step 7; lower the rate, or train in bf16"):
            check_finite({"loss": 1.0, "psnr": value}, 7, "the rate")
