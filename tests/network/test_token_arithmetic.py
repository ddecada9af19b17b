"""Each operation has the same result with and without gradients, and overwrites without."""

import pytest
import torch
from torch import Tensor

from cogvideox_sat.network.token_arithmetic import add_gated, apply_rotary, joined, modulate, rotate_pairs

B, N, TEXT, D, HEADS = 2, 7, 3, 8, 2


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def modulated(x: Tensor) -> Tensor:
    return modulate(x, drawn(B, 1, D), drawn(B, 1, D) + 1)


def gated(x: Tensor) -> Tensor:
    return add_gated(x, drawn(B, 1, D), drawn(B, N, D) - 1)


def rotated(x: Tensor) -> Tensor:
    angles = drawn(N - TEXT, D // HEADS // 2).repeat_interleave(2, dim=1)
    return apply_rotary(x.unflatten(-1, (HEADS, -1)).transpose(1, 2), angles.cos(), angles.sin())


def text_changed(x: Tensor) -> Tensor:
    text, video = x.split((TEXT, N - TEXT), dim=1)
    return joined(x, modulate(text, drawn(B, 1, D), drawn(B, 1, D)), video)


@pytest.mark.parametrize("operation", [modulated, gated, rotated, text_changed])
def test_results_and_memory(operation):
    x = drawn(B, N, D)
    before = x.clone()
    expected = operation(x)
    assert torch.equal(x, before) and expected.data_ptr() != x.data_ptr()
    with torch.no_grad():
        found = operation(x)
    assert found.data_ptr() == x.data_ptr()
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_the_rotation_keeps_lengths_and_text():
    x = drawn(B, N, D)
    out = rotated(x).transpose(1, 2).flatten(2)
    assert torch.equal(out[:, :TEXT], x[:, :TEXT])
    pairs, expected = (each.unflatten(-1, (-1, 2)).norm(dim=-1) for each in (out, x))
    torch.testing.assert_close(pairs, expected)


def test_pairs_are_turned_by_a_right_angle():
    assert rotate_pairs(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [-2.0, 1.0, -4.0, 3.0]
