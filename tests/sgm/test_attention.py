"""The attention blocks give the reference numbers, and the gradients of the plain formula."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from conftest import ROOT
from long_cases import others_long
from seeded import seed_module_, seeded_input
from sgm import attention_kernels
from sgm.attention_kernels import attend_with_xformers
from sgm.errors import UserError
from sgm.modules import attention
from support import Reference, assert_close

RECORDED = Reference("attention")
SHAPES = {  # shapes of inputs that differ from the outputs
    "geglu": (2, 5, 12),
    "ff_glu": (2, 5, 16),
}


def rand(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return attention (b, heads, n, d) by the formula; a mask is True where a query attends."""
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), v)


def assert_same_gradients(one: Tensor, other: Tensor, leaves: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Check equal values, and equal gradients of the named tensors."""
    assert_close(one, other, tolerance)
    cotangent = torch.randn_like(one)
    ours = torch.autograd.grad(one, leaves.values(), cotangent)
    others = torch.autograd.grad(other, leaves.values(), cotangent)
    for name, gradient, expected in zip(leaves, ours, others, strict=True):
        assert expected.norm() > 0, name
        assert_close(gradient, expected, tolerance)


# ---------------------------------------------------------------- reference numbers


@pytest.mark.parametrize("name", RECORDED.case["cases"])
def test_reference(name):
    case, expected = RECORDED.case["cases"][name], RECORDED[name]
    module = getattr(attention, case["class"])(**case["params"]).eval()
    assert {key: list(value.shape) for key, value in module.state_dict().items()} == case["keys"]
    seed_module_(module, RECORDED.case["seed"], prefix=f"{name}.")
    inputs = [seeded_input(name, SHAPES.get(name, expected.shape))]
    if "context_dim" in case["params"]:
        inputs.append(seeded_input(f"{name}.ctx", (2, 9, case["params"]["context_dim"])))
    options = {
        "cross_additional": {"additional_tokens": seeded_input("cross_additional.add", (2, 3, 32))},
        "crossframe": {"n_times_crossframe_attn_in_self": 2},
    }
    assert_close(module(*inputs, **options.get(name, {})), expected, 1e-5)


# ---------------------------------------------------------------- the plain formula


@pytest.mark.parametrize("kind", [attention.CrossAttention, attention.MemoryEfficientCrossAttention])
@pytest.mark.parametrize("mask_shape", [None, (2, 5), (2, 7, 5)])
def test_cross_attention_is_the_plain_formula(kind, mask_shape):
    module = kind(12, context_dim=10, heads=3, dim_head=4).double()
    x, context = rand(2, 7, 12), rand(2, 5, 10)
    mask = None if mask_shape is None else torch.rand(mask_shape) > 0.4
    if mask is not None:
        mask[..., 0] = True  # nobody looks nowhere
    q, k, v = (
        layer(tokens).unflatten(-1, (3, 4)).transpose(1, 2)
        for layer, tokens in ((module.to_q, x), (module.to_k, context), (module.to_v, context))
    )
    rows = None if mask is None else mask.reshape(2, 1, -1, 5)
    expected = module.to_out(plain_attention(q, k, v, rows).transpose(1, 2).flatten(2))
    leaves = {"x": x, "context": context, **dict(module.named_parameters())}
    assert_same_gradients(module(x, context, mask=mask), expected, leaves)


@pytest.mark.parametrize("attn_type", attention.ATTENTION)
def test_spatial_self_attention_is_the_plain_formula(attn_type):
    module = attention.SpatialSelfAttention(32, attn_type).double()
    x = rand(2, 32, 4, 3)
    normed = module.norm(x)
    q, k, v = (layer(normed).flatten(2).transpose(1, 2)[:, None] for layer in (module.q, module.k, module.v))
    gathered = plain_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, (4, 3))
    leaves = {"x": x, **dict(module.named_parameters())}
    del leaves["k.bias"]  # adds the same to every score of a query: no effect
    assert_same_gradients(module(x), x + module.proj_out(gathered), leaves)


def test_linear_attention_is_the_plain_formula():
    module = attention.LinearAttention(6, heads=2, dim_head=3).double()
    x = rand(2, 6, 4, 5)
    q, k, v = module.to_qkv(x).flatten(2).unflatten(1, (3, 2, 3)).unbind(1)
    weights = torch.einsum("bhdn,bhdm->bhnm", q, k.exp() / k.exp().sum(-1, keepdim=True))
    expected = torch.einsum("bhnm,bhem->bhen", weights, v).flatten(1, 2).unflatten(2, (4, 5))
    assert_same_gradients(module(x), module.to_out(expected), {"x": x, **dict(module.named_parameters())})


def test_every_frame_attends_to_the_first_of_its_clip():
    module = attention.CrossAttention(8, heads=2, dim_head=4).double()
    x = rand(12, 5, 8)  # 3 clips of 4 frames
    out = module(x, n_times_crossframe_attn_in_self=4)
    for frame in range(12):
        first = 4 * (frame // 4)
        assert_close(out[frame : frame + 1], module(x[frame : frame + 1], x[first : first + 1]), 1e-9)


def test_additional_tokens_take_part_and_are_not_returned():
    module = attention.CrossAttention(8, heads=2, dim_head=4).double()
    x, extra = rand(2, 5, 8), rand(2, 3, 8)
    expected = module(torch.cat([extra, x], 1))[:, 3:]
    assert_same_gradients(module(x, additional_tokens=extra), expected, {"x": x, "extra": extra})


# ---------------------------------------------------------------- xformers


@pytest.fixture
def xformers(monkeypatch):
    """Return a package `xformers` of layout (b, n, heads, d) that counts its calls."""
    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    ops.calls = 0

    def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ops.calls += 1
        if query.shape[-1] > 4:
            raise NotImplementedError("No operator found")
        weights = torch.einsum("bnhd,bmhd->bhnm", query, key) / query.shape[-1] ** 0.5
        return torch.einsum("bhnm,bmhd->bnhd", weights.softmax(-1), value)

    ops.memory_efficient_attention = memory_efficient_attention
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(attention_kernels, "installed", lambda package: package == "xformers")
    return ops


class OnCuda(torch.Tensor):
    """A tensor that says it is on CUDA, for code that asks."""

    is_cuda = True
    device = torch.device("cuda")


def test_xformers_has_its_own_layout_and_the_same_numbers(xformers):
    q, k, v = rand(2, 3, 7, 4), rand(2, 3, 5, 4), rand(2, 3, 5, 4)
    expected = attention.attend(q, k, v)
    assert_same_gradients(attend_with_xformers(q, k, v), expected, {"q": q, "k": k, "v": v})
    assert_close(attention.attend_memory_efficiently(q.as_subclass(OnCuda), k, v), expected, 1e-9)
    assert xformers.calls == 2


def test_xformers_is_left_alone_where_it_does_not_serve(xformers):
    q, k, v = rand(2, 3, 7, 8), rand(2, 3, 5, 8), rand(2, 3, 5, 8)
    expected = attention.attend(q, k, v)
    assert_close(attention.attend_memory_efficiently(q, k, v), expected, 1e-9)  # not on CUDA
    mask = torch.ones(1, 1, 7, 5, dtype=torch.bool)
    assert_close(attention.attend_memory_efficiently(q.as_subclass(OnCuda), k, v, mask), expected, 1e-9)
    assert xformers.calls == 0
    assert_close(attention.attend_memory_efficiently(q.as_subclass(OnCuda), k, v), expected, 1e-9)  # heads too large
    assert xformers.calls == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_both_kinds_agree_with_the_cpu(dtype):
    plain = attention.CrossAttention(64, heads=2, dim_head=32)
    efficient = attention.MemoryEfficientCrossAttention(64, heads=2, dim_head=32)
    efficient.load_state_dict(plain.state_dict())
    x = torch.randn(2, 50, 64)
    expected = plain(x)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-3  # TF32 may be on
    for module in (plain, efficient):
        assert_close(module.to("cuda", dtype)(x.to("cuda", dtype)).cpu().float(), expected, tolerance)


# ---------------------------------------------------------------- blocks


def saved_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, with parameters."""
    sizes = {}

    def keep(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        module(*inputs)
    return sum(sizes.values())


BLOCKS = {
    "block": lambda on: attention.BasicTransformerBlock(16, 2, 8, context_dim=10, checkpoint=on),
    "single": lambda on: attention.BasicTransformerSingleLayerBlock(16, 2, 8, context_dim=10, checkpoint=on),
    "transformer": lambda on: attention.SpatialTransformer(32, 2, 8, depth=2, context_dim=10, use_checkpoint=on),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_checkpointing_keeps_less_and_changes_nothing(name):
    plain, lean = BLOCKS[name](False).double(), BLOCKS[name](True).double()
    lean.load_state_dict(seed_module_(plain).state_dict())
    x, context = rand(2, 32, 8, 8) if name == "transformer" else rand(2, 64, 16), rand(2, 9, 10)
    cotangent = torch.randn_like(x)
    gradients = []
    for module in (plain, lean):
        out = module(x, context)
        gradients.append(torch.autograd.grad(out, [x, context, *module.parameters()], cotangent))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    assert saved_bytes(lean, x, context) < 0.5 * saved_bytes(plain, x, context)


@pytest.mark.parametrize("use_linear", [False, True])
def test_spatial_transformer_starts_as_the_identity_and_takes_a_context_a_block(use_linear):
    module = attention.SpatialTransformer(32, 2, 8, depth=2, context_dim=[10, 6], use_linear=use_linear).double()
    x, contexts = rand(2, 32, 4, 3), [rand(2, 5, 10), rand(2, 4, 6)]
    assert torch.equal(module(x, contexts), x)
    seed_module_(module)
    out = module(x, contexts)
    for gradient in torch.autograd.grad(out.square().sum(), [x, *contexts]):
        assert gradient.norm() > 0


def test_one_context_in_a_list_is_for_all_blocks():
    module = seed_module_(attention.SpatialTransformer(32, 2, 8, depth=3, context_dim=[10])).double()
    sizes = [block.attn2.to_k.in_features for block in module.transformer_blocks]
    assert sizes == [10, 10, 10]
    x, context = rand(2, 32, 4, 3), rand(2, 5, 10)
    expected = module(x, [context, context, context])
    assert torch.equal(module(x, [context]), expected) and torch.equal(module(x, context), expected)
    assert not torch.equal(module(x, [context, context, 2 * context]), expected)
    with pytest.raises(UserError, match="context: 2 contexts for 3 blocks"):
        module(x, [context, context])
    assert len(attention.SpatialTransformer(32, 2, 8, depth=3, context_dim=[10, 10]).transformer_blocks) == 3


@pytest.mark.parametrize("kind", [attention.CrossAttention, attention.MemoryEfficientCrossAttention])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, "math"])
def test_the_kernel_that_is_asked_for_computes(kind, backend):
    """Another kernel than MATH is not even tried, and MATH gives the numbers of the formula."""
    module, plain = kind(16, heads=2, dim_head=8, backend=backend), kind(16, heads=2, dim_head=8)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 7, 16)
    with torch.profiler.profile() as profile:
        out = module(x)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_attention_math" in names
    assert not any("flash" in name or "efficient" in name for name in names)
    assert_close(out, plain(x), 1e-5)


def test_blocks_hand_the_kernel_on():
    blocks = [
        attention.BasicTransformerBlock(16, 2, 8, sdp_backend="MATH"),
        attention.BasicTransformerSingleLayerBlock(16, 2, 8, sdp_backend="MATH"),
        attention.SpatialTransformer(32, 2, 8, depth=2, sdp_backend="MATH"),
    ]
    for block in blocks:
        kernels = [each.backend for each in block.modules() if isinstance(each, attention.CrossAttention)]
        assert kernels and set(kernels) == {SDPBackend.MATH}
    for wrong in ("fast", 3):
        with pytest.raises(UserError, match=f"backend: {wrong!r} is not a kernel of PyTorch; use one of .*MATH"):
            attention.CrossAttention(16, backend=wrong)
    with pytest.raises(UserError, match=r"backend: CUDNN_ATTENTION cannot compute .* on cpu .* use MATH"):
        attention.CrossAttention(16, heads=2, dim_head=8, backend="cudnn_attention")(torch.zeros(1, 3, 16))


def test_small_functions():
    x = torch.zeros(1000, 4)
    assert attention.init_(x) is x and 0.45 < x.max() <= 0.5 and -0.5 <= x.min() < -0.45
    norm = attention.Normalize(64)
    assert (norm.num_groups, norm.num_channels, norm.eps, norm.affine) == (32, 64, 1e-6, True)
    assert attention.max_neg_value(torch.zeros(1, dtype=torch.float16)) == -65504.0
    assert attention.exists(0) and not attention.exists(None)
    assert list(attention.uniq([3, 1, 3, 2, 1])) == [3, 1, 2]
    assert attention.default(None, lambda: 5) == 5 and attention.default(0, 7) == 0


# ---------------------------------------------------------------- errors and imports


def test_what_does_not_fit_is_said_in_one_line():
    with pytest.raises(UserError, match="attention 'flash' is unknown; use 'softmax' or 'softmax-xformers'"):
        attention.BasicTransformerBlock(16, 2, 8, attn_mode="flash")
    with pytest.raises(UserError, match="attention 'flash' is unknown"):
        attention.SpatialTransformer(32, 2, 8, attn_type="flash")
    with pytest.raises(UserError, match="batch of 5 is not a multiple of 2 frames"):
        attention.CrossAttention(8)(torch.zeros(5, 3, 8), n_times_crossframe_attn_in_self=2)
    with pytest.raises(UserError, match=r"context_dim: got 2 sizes, \[4, 5\]; give one, or 3 \(depth\)"):
        attention.SpatialTransformer(32, 2, 8, depth=3, context_dim=[4, 5])


NAMES = ["sgm.modules.attention", "sgm.modules.diffusionmodules.model", "sgm.modules.video_attention"]


@pytest.mark.slow
@pytest.mark.parametrize("first", others_long(*NAMES))
def test_importable_first_and_in_any_order(first):
    """In a fresh process, and without xformers."""
    rest = [name for name in reversed(NAMES) if name != first]
    modules = ", ".join(["sys", first, *rest, "sgm.modules.autoencoding.temporal_ae"])
    code = f"import {modules}\nprint('xformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "False"
