"""Parts of tensors in their files equal those of the whole, and take no memory."""

import pytest
import torch

from cogvideox_sat.weights.stored_values import StoredValue, forget_value, value_of, waiting, waiting_bytes


@pytest.mark.parametrize(("start", "stop"), [(0, 24), (0, 5), (7, 8), (11, 19), (23, 24), (9, 9)])
def test_parts_are_those_of_the_whole(start, stop):
    """The tensors follow each other and are cast; data outside of a part is not read."""
    rows = [torch.arange(8.0).view(2, 4), torch.arange(8.0, 12.0).view(1, 4), torch.arange(12.0, 24.0).view(3, 4)]
    value = StoredValue(rows)
    assert value.shape == (6, 4) and torch.equal(value.tensor(), torch.arange(24.0).view(6, 4))
    target = torch.full((6, 4), -1, dtype=torch.float64)
    value.fill(target, start, stop)
    expected = torch.arange(24.0, dtype=torch.float64)
    expected[:start] = expected[stop:] = -1
    assert torch.equal(target.view(-1), expected)


def test_a_parameter_that_waits_is_like_the_real_one():
    old = torch.nn.Parameter(torch.empty(6, 4, dtype=torch.bfloat16, device="meta"), requires_grad=False)
    old.model_parallel = True
    parameter = waiting(old, StoredValue([torch.zeros(6, 4)]), None)
    assert (parameter.shape, parameter.dtype, parameter.device.type) == ((6, 4), torch.bfloat16, "cpu")
    assert parameter.model_parallel and not parameter.requires_grad
    assert parameter.untyped_storage().nbytes() == 2
    module = torch.nn.Module()
    module.weight, module.other = parameter, torch.nn.Parameter(torch.zeros(3))
    assert waiting_bytes(module) == 48
    forget_value(parameter)
    assert value_of(parameter) is None and waiting_bytes(module) == 0
