"""Each function equals PyTorch's operations in float64: values and gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideox_sat.network.lean_functions import GatedSum, GeluProduct, Heads, ModulatedProduct
from cogvideox_sat.network.token_arithmetic import apply_rotary
from support import assert_close

B, N, TEXT, D, HEADS = 2, 7, 3, 12, 2


def random(*shape: int, trained: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_(trained)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def assert_same(ours: tuple[Tensor, ...], plain: tuple[Tensor, ...], inputs: list[Tensor | None]) -> None:
    """Compare results, and gradients of a random function of them."""
    trained = [each for each in inputs if each is not None and each.requires_grad]
    weights = [torch.randn_like(each) for each in plain]
    gradients = []
    for results in (ours, plain):
        total = sum((result * weight).sum() for result, weight in zip(results, weights, strict=True))
        gradients.append(torch.autograd.grad(total, trained))
    for found, expected in zip((*ours, *gradients[0]), (*plain, *gradients[1]), strict=True):
        assert_close(found, expected, 1e-12)


def each_kind(x: Tensor, text: Tensor, video: Tensor) -> Tensor:
    return torch.where(torch.arange(x.shape[1])[:, None] < TEXT, text, video)


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("trained", [{"all"}, {"x"}, {"adapter"}, {"x", "adapter"}, {"norm"}, {"modulation"}])
def test_a_modulated_product(trained, rank):
    def of(kind: str, *shape: int) -> Tensor:
        return random(*shape, trained=kind in trained or "all" in trained)

    if trained == {"adapter"} and not rank:
        return
    x, norm_weight, norm_bias = of("x", B, N, D), of("norm", D), of("norm", D)
    modulation = [of("modulation", B, 1, D) for _ in range(4)]
    weight, bias = of("product", 3 * D, D), of("product", 3 * D)
    down, up = ([of("adapter", *shape) for _ in range(3 if rank else 0)] for shape in ((rank, D), (D, rank)))
    ours = ModulatedProduct.apply(x, norm_weight, norm_bias, 1e-5, TEXT, *modulation, weight, bias, 0.3, *down, *up)
    text_shift, text_scale, shift, scale = modulation
    normed = F.layer_norm(x, (D,), norm_weight, norm_bias, 1e-5)
    modulated = normed * (1 + each_kind(x, text_scale, scale)) + each_kind(x, text_shift, shift)
    plain = F.linear(modulated, weight, bias)
    if rank:
        plain = plain + 0.3 * torch.cat([modulated @ a.T @ b.T for a, b in zip(down, up, strict=True)], dim=-1)
    assert_same((ours,), (plain,), [x, norm_weight, norm_bias, *modulation, weight, bias, *down, *up])


@pytest.mark.parametrize("trained", itertools.product([False, True], repeat=3))
def test_a_gated_sum(trained):
    if not any(trained):
        return
    (x, update), gates = (
        (random(B, N, D, trained=each) for each in trained[:2]),
        [random(B, 1, D, trained=trained[2]) for _ in range(2)],
    )
    plain = x + each_kind(x, *gates) * update
    assert_same((GatedSum.apply(x, update, TEXT, *gates),), (plain,), [x, update, *gates])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_heads(rotary, trained):
    qkv, e = random(B, N, 3 * D), D // HEADS
    norms = [random(e, trained=trained) for _ in range(4)]
    cos, sin = (random(N - TEXT, e, trained=False) for _ in range(2)) if rotary else (None, None)
    ours = Heads.apply(qkv, HEADS, cos, sin, (1e-5, 1e-3), *norms)
    q, k, v = (part.unflatten(-1, (HEADS, e)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    q, k = F.layer_norm(q, (e,), *norms[:2], 1e-5), F.layer_norm(k, (e,), *norms[2:], 1e-3)
    if rotary:
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    assert_same(ours, (q, k, v), [qkv, *norms])


@pytest.mark.parametrize("trained", [(True, False), (False, True), (True, True)])
def test_gelu_and_a_product(trained):
    x, (weight, bias) = random(B, N, 4 * D, trained=trained[0]), (random(D, 4 * D, trained=trained[1]), random(D))
    plain = F.linear(F.gelu(x, approximate="tanh"), weight, bias)
    assert_same((GeluProduct.apply(x, weight, bias),), (plain,), [x, weight, bias])
