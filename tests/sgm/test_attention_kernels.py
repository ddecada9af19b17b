"""Each kernel computes supported tensors; others go to the next, or are an error."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from sgm.attention_kernels import (
    ATTENTION,
    KERNELS,
    SOFTMAX,
    WRITTEN_OUT,
    AttentionKernel,
    attend,
    kernel_named,
    register,
)
from sgm.errors import UserError
from sgm.modules import attention
from sgm.modules.attention import SpatialSelfAttention, SpatialTransformer
from sgm.modules.video_attention import SpatialVideoTransformer
from support import assert_close


@pytest.fixture
def registry():
    """Restore both tables of kernels after a test."""
    tables = (KERNELS, ATTENTION)
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


def tensors(n: int = 7, m: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, tokens, 8, dtype=dtype) for tokens in (n, m, m)]


def counting(calls: list[tuple], result: Callable[..., Tensor | None] = attend) -> Callable[..., Tensor | None]:
    """Return an attention function that notes its keywords."""

    def compute(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor | None:
        calls.append(options)
        return result(q, k, v, **options)

    return compute


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_every_kernel_gives_the_same_whatever_it_is_given(kernel):
    """On tensors that it supports and on others, which the kernel that it names computes."""
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        q, k, v = tensors(dtype=dtype)
        mask = torch.ones(1, 1, 7, 5, dtype=torch.bool).tril()
        for options in ({}, {"mask": mask}, {"backend": SDPBackend.MATH}):
            expected = attend(*(x.double() for x in (q, k, v)), mask=options.get("mask"))
            assert_close(kernel(q, k, v, **options).double(), expected, tolerance)
    torch.manual_seed(1)
    dropped = kernel(q, k, v, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(dropped, attend(q, k, v, dropout_p=0.5))
    assert not torch.equal(dropped, kernel(q, k, v))


LIMITS = {
    "mask": ({}, {"mask": torch.ones(1, 1, 7, 5, dtype=torch.bool)}),
    "dropout": ({}, {"dropout_p": 0.5}),
    "device": ({"devices": frozenset({"cuda"})}, {}),
    "dtype": ({"dtypes": frozenset({torch.bfloat16})}, {}),
    "size": ({"most_weights": 2 * 3 * 7 * 5 - 1}, {}),
    "package": ({"package": "no_such_package"}, {}),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_what_a_kernel_does_not_support_is_computed_by_the_one_it_names(limit):
    (limits, options), calls, others = LIMITS[limit], [], []
    other = AttentionKernel("other", counting(others), takes=("mask", "dropout_p"))
    kernel = AttentionKernel("limited", counting(calls), otherwise=other, **limits)
    kernel(*tensors(), **options)
    assert (len(calls), len(others)) == (0, 1)
    alone = replace(kernel, otherwise=None)
    with pytest.raises(UserError, match=r"^attention 'limited' does not support torch.float32 .* on cpu.*'softmax'$"):
        alone(*tensors(), **options)


def test_a_kernel_without_limits_gets_all_and_no_keyword_that_it_does_not_know():
    calls = []
    kernel = AttentionKernel("all", counting(calls), most_weights=2 * 3 * 7 * 5, package="torch")
    assert torch.equal(kernel(*tensors(), backend=SDPBackend.MATH), attend(*tensors()))
    takes = replace(kernel, takes=("mask",))
    takes(*tensors(), backend=SDPBackend.MATH)
    assert calls == [{}, {"mask": None}]


def test_a_kernel_may_find_out_that_it_cannot():
    calls = []
    kernel = AttentionKernel("shy", counting(calls, lambda *_: None), otherwise=SOFTMAX)
    assert torch.equal(kernel(*tensors()), attend(*tensors())) and len(calls) == 1


def test_a_registered_kernel_serves_by_its_name(registry):
    """In the blocks for images and for video, alone and inside of other blocks."""
    calls = []
    kernel = register(AttentionKernel("mine", counting(calls)))
    assert kernel_named("mine") is kernel is attention.ATTENTION["mine"]
    x = torch.randn(2, 32, 4, 4)
    SpatialSelfAttention(32, "mine")(x)
    assert len(calls) == 1
    SpatialTransformer(32, 2, 16, attn_type="mine", use_checkpoint=False)(x)
    assert len(calls) == 3
    SpatialVideoTransformer(32, 2, 16, timesteps=2, attn_mode="mine")(x)
    assert len(calls) == 7
    with pytest.raises(ValueError, match="'mine' is registered already"):
        register(AttentionKernel("mine", attend))


def test_names_of_configurations(registry):
    """Kernels that a network chooses itself are not among the names."""
    register(AttentionKernel("mine", attend))
    for unknown in ("flash", WRITTEN_OUT.name, None, 3, []):
        with pytest.raises(UserError) as error:
            kernel_named(unknown)
        assert str(error.value) == (f"attention '{unknown}' is unknown; use 'softmax' or 'softmax-xformers' or 'mine'")


def test_modules_that_hold_a_kernel_are_copied_and_pickled():
    module = SpatialTransformer(32, 2, 16, attn_type="softmax-xformers")
    x = torch.randn(1, 32, 4, 4)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
