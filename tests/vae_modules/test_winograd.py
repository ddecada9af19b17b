"""The fast kernels of the video autoencoder equal plain formulas, with gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seeded import seeded_input, seeded_tensor
from sgm.modules.autoencoding.clip import Chunk
from support import assert_close
from vae_modules import winograd
from vae_modules.normalization import GroupNorm
from vae_modules.passes.channel_sums import channel_sums
from vae_modules.passes.modulation import modulated_silu

pytestmark = pytest.mark.usefixtures("one_thread")


def clip(name: str, *shape: int) -> Tensor:
    return seeded_input(name, shape).contiguous(memory_format=torch.channels_last_3d).requires_grad_()


def doubles(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach().double().requires_grad_() for x in tensors]


def gradients(y: Tensor, inputs: list[Tensor | None]) -> list[Tensor]:
    cotangent = seeded_input("cotangent", y.shape).to(y.dtype)
    return torch.autograd.grad(y, [x for x in inputs if x is not None], cotangent)


# ---------------------------------------------------------------- convolution


def plain_causal_conv3d(before: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    before = x[:, :, :1].expand(-1, -1, 2, -1, -1) if before is None else before
    return F.conv3d(torch.cat([before, x], dim=2), weight, bias, padding=(0, 1, 1))


def convolution_inputs(frames: int, continues: bool) -> list[Tensor | None]:
    weight = seeded_tensor("weight", (24, 16, 3, 3, 3)).requires_grad_()
    before = clip("before", 2, 16, 2, 5, 6) if continues else None
    return [before, clip("x", 2, 16, frames, 5, 6), weight, seeded_tensor("bias", (24,)).requires_grad_()]


@pytest.mark.parametrize("continues", [False, True], ids=["at the start", "after frames"])
@pytest.mark.parametrize("frames", [*range(1, 10), 13])
def test_minimal_filtering_equals_convolution(frames, continues):
    """All divisions of a clip into pieces of four, two and one frames are equal.

    Gradients of the frames before are included.
    """
    inputs = convolution_inputs(frames, continues)
    y = winograd.causal_conv3d(*inputs)
    exact_inputs = doubles(*inputs)
    exact = plain_causal_conv3d(*exact_inputs)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert_close(y, exact, 2e-6)
    for actual, expected in zip(gradients(y, inputs), gradients(exact, exact_inputs), strict=True):
        assert_close(actual, expected, 3e-6)


@pytest.mark.parametrize("continues", [False, True], ids=["at the start", "after frames"])
def test_convolution_gradients_in_double_precision(continues):
    before = seeded_input("before", (2, 2, 2, 3, 2)).double().requires_grad_() if continues else None
    x, weight = seeded_input("x", (2, 2, 7, 3, 2)).double(), seeded_tensor("weight", (3, 2, 3, 3, 3)).double()
    bias = seeded_tensor("bias", (3,)).double()
    inputs = (before, *(each.requires_grad_() for each in (x, weight, bias)))
    assert torch.autograd.gradcheck(winograd.causal_conv3d, inputs, fast_mode=True)


@pytest.mark.parametrize("wanted", range(4))
def test_convolution_makes_only_the_gradients_that_are_wanted(wanted):
    """Frozen weights, or an input that needs no gradient, change nothing about the others."""
    inputs = convolution_inputs(5, continues=True)
    expected = gradients(winograd.causal_conv3d(*inputs), inputs)[wanted]
    inputs = [each.detach().requires_grad_(index == wanted) for index, each in enumerate(inputs)]
    y = winograd.causal_conv3d(*inputs)
    (actual,) = gradients(y, [inputs[wanted]])
    assert torch.equal(actual, expected)


def test_convolution_keeps_no_intermediate_tensors():
    inputs = convolution_inputs(9, continues=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        winograd.causal_conv3d(*inputs)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in inputs[:3]}


def test_convolution_is_fast_only_where_that_is_exact_and_pays():
    x, weight = clip("x", 1, 16, 5, 4, 4), seeded_tensor("weight", (16, 16, 3, 3, 3))
    assert winograd.serves(x, weight)
    assert not winograd.serves(x.bfloat16(), weight.bfloat16())
    assert not winograd.serves(x.double(), weight.double())
    assert not winograd.serves(x[:, :3], weight[:, :3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not winograd.serves(x, weight)
    large = torch.empty(512, 512, 3, 3, 3)
    assert winograd.serves(torch.empty(1, 512, 4, 12, 18), large)
    assert not winograd.serves(torch.empty(1, 512, 4, 8, 12), large)


# ---------------------------------------------------------------- normalization


def resized(small: Tensor, like: Tensor, lead: bool) -> Tensor:
    """Return maps resized to `like` by nearest neighbour, the first frame separately."""
    if not lead or like.shape[2] == 1:
        return F.interpolate(small, size=like.shape[2:], mode="nearest")
    rest = F.interpolate(small[:, :, 1:], size=(like.shape[2] - 1, *like.shape[3:]), mode="nearest")
    return torch.cat([F.interpolate(small[:, :, :1], size=(1, *like.shape[3:]), mode="nearest"), rest], dim=2)


SHAPES = [  # of x and the maps, (time, height, width); whether the first frame stands alone
    ((4, 4, 6), (1, 1, 1), False),
    ((5, 4, 6), (3, 2, 3), True),
    ((9, 8, 4), (3, 1, 1), True),
    ((3, 2, 2), (3, 2, 2), True),
    ((1, 4, 4), (1, 2, 2), True),
    ((8, 4, 4), (2, 2, 2), False),
]


@pytest.mark.parametrize(("size", "maps", "lead"), SHAPES)
def test_modulation_equals_the_plain_formula(size, maps, lead):
    inputs = [clip("x", 2, 8, *size), clip("scale", 2, 8, *maps), clip("shift", 2, 8, *maps)]
    y = modulated_silu(*inputs, lead)
    exact_inputs = x, scale, shift = doubles(*inputs)
    exact = F.silu(x * resized(scale, x, lead) + resized(shift, x, lead))
    assert_close(y, exact, 1e-6)
    for actual, expected in zip(gradients(y, inputs), gradients(exact, exact_inputs), strict=True):
        assert_close(actual, expected, 1e-6)


def test_modulation_gradients_in_double_precision():
    inputs = doubles(clip("x", 1, 2, 5, 2, 4), clip("scale", 1, 2, 3, 1, 2), clip("shift", 1, 2, 3, 1, 2))
    assert torch.autograd.gradcheck(lambda *inputs: modulated_silu(*inputs, lead=True), inputs)


def test_channel_sums():
    (x,) = doubles(clip("x", 2, 3, 2, 3, 4))
    assert torch.autograd.gradcheck(channel_sums, x)
    sums = channel_sums(x.float())
    assert sums.dtype == torch.float64
    assert_close(sums, torch.stack([x.sum((2, 3, 4)), x.square().sum((2, 3, 4))]), 1e-6)
    assert torch.equal(channel_sums(x[:, :, :0]), torch.zeros_like(sums))


def test_group_norm_equals_torch():
    norm = GroupNorm(64).requires_grad_()
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = clip("x", 2, 64, 3, 4, 4)
    (exact_x,) = doubles(x)
    weight, bias = doubles(norm.weight, norm.bias)
    exact = F.silu(F.group_norm(exact_x, 32, weight, bias, eps=1e-6))
    y = norm(x, Chunk(lead=True))
    assert_close(y, exact, 1e-6)
    actual, expected = gradients(y, [x, norm.weight, norm.bias]), gradients(exact, [exact_x, weight, bias])
    for each, exact_each in zip(actual, expected, strict=True):
        assert_close(each, exact_each, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modulation_in_half_precision_rounds_once(dtype):
    """The maps and all sums stay in float32."""
    inputs = [clip("x", 1, 8, 5, 4, 4).to(dtype).detach().requires_grad_(), clip("scale", 1, 8, 3, 2, 2)]
    inputs.append(clip("shift", 1, 8, 3, 2, 2))
    y = modulated_silu(*inputs, lead=True)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    expected = modulated_silu(*wide, lead=True)
    assert y.dtype == dtype
    half_ulp = torch.finfo(dtype).eps / 2
    assert_close(y.float(), expected, 2 * half_ulp)
    actual = gradients(y, inputs)
    assert [each.dtype for each in actual] == [dtype, torch.float32, torch.float32]
    for each, wide_each in zip(actual, gradients(expected, wide), strict=True):
        assert_close(each.float(), wide_each, 4 * half_ulp)
