"""Noise schedules against the recorded reference tables, and at the ends of their range."""

import pytest
import torch

from sgm.errors import UserError
from sgm.modules.diffusionmodules.discretizer import (
    EDMDiscretization,
    LegacyDDPMDiscretization,
    ZeroSNRDDPMDiscretization,
)
from support import Reference, assert_close

TABLES = Reference("sampling/discretization")
SCHEDULES = {
    "edm": EDMDiscretization(),
    "legacy": LegacyDDPMDiscretization(),
    "zerosnr_s1": ZeroSNRDDPMDiscretization(shift_scale=1.0),
    "zerosnr_s3": ZeroSNRDDPMDiscretization(shift_scale=3.0),
    "zerosnr_keep": ZeroSNRDDPMDiscretization(shift_scale=3.0, keep_start=True),
    "zerosnr_post": ZeroSNRDDPMDiscretization(shift_scale=3.0, post_shift=True),
}


@pytest.mark.parametrize("key", TABLES.tensors)
def test_table_is_the_reference_table(key):
    name, n, *options = key.split(".")
    schedule, n = SCHEDULES[name], int(n)
    if options == ["idx"]:
        _, idx = schedule(n, return_idx=True)
        assert torch.equal(idx, TABLES[key])
    else:
        zero_and_flip = options == ["zero", "flip"]
        levels = schedule(n, do_append_zero=zero_and_flip, flip=zero_and_flip)
        assert levels.dtype == torch.float32
        assert_close(levels, TABLES[key], 1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n", [1, 2, 50, 999, 1000])
def test_every_schedule_has_any_number_of_steps(name, n):
    """Levels run strictly from noisy to clean and their indices ascend, from 1 step to 1000."""
    schedule = SCHEDULES[name]
    levels, idx = schedule(n, do_append_zero=False, return_idx=True)
    alpha = schedule.to_alpha(levels.double())
    assert levels.isfinite().all() and len(levels) == len(idx) == n
    assert (alpha.diff() > 0).all() and (idx.diff() > 0).all()
    assert idx[0] >= 0 and idx[-1] == 999


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name.startswith("zerosnr")])
@pytest.mark.parametrize("n", [1, 7, 1000])
def test_zero_snr_starts_from_pure_noise(name, n):
    assert SCHEDULES[name](n)[0] == 0.0


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_impossible_number_of_steps(n):
    with pytest.raises(UserError, match=f"num_steps: got {n}"):
        SCHEDULES["zerosnr_s1"](n)
    with pytest.raises(UserError, match="num_steps: got 0"):
        SCHEDULES["edm"](0)
