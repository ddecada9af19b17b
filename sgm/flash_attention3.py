"""FlashAttention 3 (arXiv:2407.08608) for Hopper GPUs, from any installed package of it.

`flash_attn_interface`, built from the authors' repository, also computes gradients; PyTorch can call it instead of its
own FlashAttention. `fa3_fwd_interface`, of the package fa3-fwd, has only the forward pass in bfloat16. Both are
imported on first use.
"""

import importlib
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from sgm.attention_kernels import SOFTMAX, AttentionKernel, installed, register

WHOLE, FORWARD = "flash_attn_interface", "fa3_fwd_interface"
PACKAGES = f"{WHOLE} (the authors' flash-attention/hopper) or fa3-fwd, which has no gradients"


def is_installed(gradients: bool) -> bool:
    """Return whether a package with the forward pass is installed.

    Args:
        gradients: the package must have the backward pass too.
    """
    return installed(WHOLE) or (installed(FORWARD) and not gradients)


def activate() -> None:
    """Let PyTorch's FlashAttention be version 3 from now on; `WHOLE` must be installed.

    Raises:
        RuntimeError: PyTorch does not support the package's version.
        ImportError: PyTorch is older than 2.11, and cannot use the package.
    """
    from torch.nn.attention import activate_flash_attention_impl

    activate_flash_attention_impl("FA3")


@cache
def _forward() -> Callable[..., Tensor | tuple[Tensor, ...]]:
    return importlib.import_module(FORWARD).flash_attn_func


# A compiler calls a custom operator unchanged.
@torch.library.custom_op("cogvideox::flash_attention3", mutates_args=())
def flash_attention3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for q, k, v (b, n, heads, d).

    The tensors are bfloat16, without gradients.
    """
    out = _forward()(q, k, v)
    return out if isinstance(out, Tensor) else out[0]


@flash_attention3.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def attend_by_flash_attention3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return `attend` without mask and dropout, by the package with only the forward pass."""
    return flash_attention3(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


FLASH3 = register(
    AttentionKernel(
        "flash3",
        attend_by_flash_attention3,
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16}),
        package=FORWARD,
        otherwise=SOFTMAX,
        in_configurations=False,
    )
)
