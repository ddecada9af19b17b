"""Recompute the activations of a layer in its backward pass, instead of keeping them.

A layer that keeps its attention stores the result of the attention and the logarithms of the softmax sums, which the
gradient needs; everything else is recomputed. This saves most of the memory and costs little time.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from sat.model.transformer import BaseTransformer
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cogvideox_sat.configuration.recomputation import Recomputation
from cogvideox_sat.network.layer_runner import LayerContext, RunLayer

# PyTorch's attention kernels that do not store the attention weights. Some versions of PyTorch lack some of them.
FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


class ActivationCheckpointing:
    """Runs the layers in training as `checkpoint_activations` says; see `Recomputation.of`.

    Args:
        transformer: transformer whose last `checkpoint_skip_layers` layers keep all activations.
    """

    def __init__(self, transformer: BaseTransformer):
        self.transformer = transformer

    def recomputation(self, layers: int) -> Recomputation:
        """Return what the layers of the transformer recompute."""
        return Recomputation.of(
            self.transformer.checkpoint_activations, layers, self.transformer.checkpoint_skip_layers
        )

    def __call__(self, run: RunLayer, hidden: Tensor, context: LayerContext) -> Tensor:
        """Return `run(hidden)`."""
        if not (context.training and torch.is_grad_enabled()):
            return run(hidden)
        chosen = self.recomputation(context.layers)
        if context.layer < chosen.whole:
            return checkpoint(run, hidden, use_reentrant=False)
        if context.layer < chosen.whole + chosen.attention:
            return run(hidden) if context.keeps_attention else keeping_attention(run, hidden)
        return run(hidden)


def keeping_attention(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return `run(*tensors)`; only `tensors` and the results of attention are kept."""
    result: Tensor = checkpoint(run, *tensors, use_reentrant=False, context_fn=attention_contexts)
    return result


def attention_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts for `torch.utils.checkpoint`: forward pass and recomputation."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept_operators() else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def kept_operators() -> frozenset[Any]:
    """Return the operators whose results are kept."""
    known = [getattr(torch.ops.aten, name).default for name in FUSED_ATTENTION if hasattr(torch.ops.aten, name)]
    own = getattr(torch.ops.cogvideox, "flash_attention3", None)
    return frozenset([*known, *([own.default] if own is not None else [])])
