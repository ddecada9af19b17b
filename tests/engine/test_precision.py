"""The dtype of an engine, and advice when its range is too small."""

import pytest
import torch

from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.engine.precision import check_finite_output, dtype_of, other_precision
from sgm.errors import UserError


def test_the_dtype_of_the_settings():
    assert [dtype_of(EngineSettings({}, **flags)) for flags in ({}, {"fp16": True}, {"bf16": True})] == [
        *(torch.float32, torch.float16, torch.bfloat16)
    ]
    with pytest.raises(UserError, match="fp16 and bf16"):
        dtype_of(EngineSettings({}, fp16=True, bf16=True))


def test_what_to_do_about_values_that_are_not_finite():
    assert "use bf16 (--bf16)" in other_precision(torch.float16)
    assert "check the weights" in other_precision(torch.float32)
    check_finite_output(torch.ones(2), torch.float16)
    with pytest.raises(UserError, match=r"not finite: use float32 \(--no-bf16\)"):
        check_finite_output(torch.tensor([1.0, torch.inf]), torch.bfloat16)
