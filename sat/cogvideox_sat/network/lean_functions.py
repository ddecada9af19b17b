"""Parts of a transformer layer that keep little for the backward pass, without a compiler.

Results that are cheap to compute (norms, modulation, gelu) are recomputed instead of kept. Text and video are modulated
and gated in place, instead of being split and joined. The values equal those of PyTorch's functions, called one after
the other.
Shapes: b batch, n tokens (the first `text` of them are text), d width, h heads of e = d / h channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogvideox_sat.network.fused_lora import gradients_of_down, gradients_of_low_rank, product_with_low_rank
from cogvideox_sat.network.token_arithmetic import rotate_pairs

GELU = "tanh"  # PyTorch's name of the approximation


def by_kind(x: Tensor, text: int) -> tuple[Tensor, ...]:
    """Return the text tokens and the video tokens, as views of x (b, n, d)."""
    return x.split((text, x.shape[1] - text), dim=1)


class ModulatedProduct(torch.autograd.Function):
    """(norm(x)·(1 + scale) + shift)·Wᵀ + bias, with the terms of LoRA.

    Only x is kept for the backward pass, which other functions keep anyway.

    Args:
        norm_weight, norm_bias, eps: of the layer norm.
        text: number of text tokens.
        text_shift, text_scale, video_shift, video_scale: (b, 1, d).
        lora_scale, matrices: as in `AddLowRank`; without matrices, no LoRA is applied.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        text: int,
        text_shift: Tensor,
        text_scale: Tensor,
        video_shift: Tensor,
        video_scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_scale: float,
        *matrices: Tensor,
    ) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        modulation = (text_shift, text_scale, video_shift, video_scale)
        modulated = _modulate(normed, text, modulation)
        out, low = product_with_low_rank(modulated, weight, bias, lora_scale, matrices)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, *modulation, weight, low, *matrices)
        ctx.eps, ctx.text, ctx.lora_scale = eps, text, lora_scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, mean, rstd, *rest = ctx.saved_tensors
        modulation, (weight, low, *matrices) = rest[:4], rest[4:]
        of_norm, of_modulation = ctx.needs_input_grad[:3], ctx.needs_input_grad[5:9]
        needs_weight, needs_bias = ctx.needs_input_grad[9:11]
        needs_low = low is not None and any(ctx.needs_input_grad[12:])
        grad, size = grad.flatten(0, 1), x.shape[-1:]

        grad_x, grad_low, grad_up = gradients_of_low_rank(
            grad, weight, low, ctx.lora_scale, matrices, any((*of_norm, *of_modulation))
        )
        grad_x = grad_x.view(x.shape) if grad_x is not None else None
        normed = None
        if any(of_modulation) or needs_weight or needs_low:
            normed = torch.native_layer_norm(x, size, norm_weight, norm_bias, ctx.eps)[0]
        grad_modulation: list[Tensor | None] = [None] * 4
        if any(of_modulation) and grad_x is not None and normed is not None:
            kinds = zip(by_kind(grad_x, ctx.text), by_kind(normed, ctx.text), strict=True)
            sums = [(part.sum(1, keepdim=True), (part * of).sum(1, keepdim=True)) for part, of in kinds]
            grad_modulation = [each for pair in sums for each in pair]
        grad_weight: Tensor | None = None
        grad_down: Sequence[Tensor | None] = [None] * len(grad_up)
        if normed is not None and (needs_weight or needs_low):
            modulated = _modulate(normed, ctx.text, modulation).flatten(0, 1)
            grad_weight = grad.t() @ modulated if needs_weight else None
            grad_down = gradients_of_down(grad_low, modulated, matrices)
            del modulated
        del normed
        grads: Sequence[Tensor | None] = (None, None, None)
        if any(of_norm) and grad_x is not None:
            for part, scale in zip(by_kind(grad_x, ctx.text), modulation[1::2], strict=True):
                part.mul_(1 + scale)
            grads = torch.ops.aten.native_layer_norm_backward(
                grad_x, x, size, mean, rstd, norm_weight, norm_bias, list(of_norm)
            )
        grad_bias = grad.sum(0) if needs_bias else None
        return *grads, None, None, *grad_modulation, grad_weight, grad_bias, None, *grad_down, *grad_up


def _modulate(normed: Tensor, text: int, modulation: Sequence[Tensor]) -> Tensor:
    """Return normed·(1 + scale) + shift, computed in place."""
    for part, shift, scale in zip(by_kind(normed, text), modulation[::2], modulation[1::2], strict=True):
        torch.addcmul(shift, part, 1 + scale, out=part)
    return normed


class GatedSum(torch.autograd.Function):
    """x + gate·update, with gates (b, 1, d) for the text and for the video."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, text: int, text_gate: Tensor, video_gate: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        kinds = zip(by_kind(out, text), by_kind(x, text), by_kind(update, text), (text_gate, video_gate), strict=True)
        for result, part, addend, gate in kinds:
            torch.addcmul(part, gate, addend, out=result)
        ctx.save_for_backward(update if any(ctx.needs_input_grad[3:]) else None, text_gate, video_gate)
        ctx.text = text
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        update, *gates = ctx.saved_tensors
        grad_update, grad_gates = None, [None, None]
        if ctx.needs_input_grad[1]:
            grad_update = torch.empty_like(grad, memory_format=torch.contiguous_format)
            by_gate = zip(by_kind(grad_update, ctx.text), by_kind(grad, ctx.text), gates, strict=True)
            for result, part, gate in by_gate:
                torch.mul(part, gate, out=result)
        if update is not None:
            kinds = zip(by_kind(grad, ctx.text), by_kind(update, ctx.text), strict=True)
            grad_gates = [(part * addend).sum(1, keepdim=True) for part, addend in kinds]
        return grad, grad_update, None, *grad_gates


class Heads(torch.autograd.Function):
    """q, k, v (b, h, n, e) from their joint product (b, n, 3 d), with norms and rotation.

    q and k are normalised over channels and then rotated.

    Args:
        norms: weight and bias of the norm of q, then of that of k; `eps` holds their epsilons.
        cos, sin: (n - text, e) for the video; None: no rotation.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None, eps: tuple[float, float], *norms: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        *queries_keys, v = _heads_of(qkv, heads)
        results: list[Tensor] = []
        kept: list[Tensor] = []
        # Attention returns its result in the memory layout of q. The next product takes this layout, and then needs no
        # copy.
        queries_keys[0] = queries_keys[0].transpose(1, 2)
        for x, weight, bias, each in zip(queries_keys, norms[::2], norms[1::2], eps, strict=True):
            normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, each)
            if not results:
                normed = normed.transpose(1, 2)
            if cos is not None and sin is not None:
                video = normed[:, :, normed.shape[2] - len(cos) :]
                rotated = rotate_pairs(video)
                video.mul_(cos).addcmul_(rotated, sin)
            results.append(normed)
            kept += [mean, rstd]
        ctx.save_for_backward(qkv, cos, sin, *norms, *kept)
        ctx.heads = heads
        return results[0], results[1], v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin, *rest = ctx.saved_tensors
        norms, kept = rest[:4], rest[4:]
        grad_qkv = torch.empty_like(qkv)
        results, sources = _heads_of(grad_qkv, ctx.heads), _heads_of(qkv, ctx.heads)
        results[2].copy_(grads[2])
        grad_norms: list[Tensor | None] = []
        for index in range(2):
            pair = slice(2 * index, 2 * index + 2)
            grad, (weight, bias), (mean, rstd) = grads[index], norms[pair], kept[pair]
            if cos is not None and sin is not None:
                grad = grad.clone(memory_format=torch.contiguous_format)
                video = grad[:, :, grad.shape[2] - len(cos) :]
                rotated = rotate_pairs(video * sin)
                video.mul_(cos).sub_(rotated)
            mask = [True, *ctx.needs_input_grad[5 + 2 * index : 7 + 2 * index]]
            source, result = sources[index], results[index]
            if index == 0:
                grad, source, result = (each.transpose(1, 2) for each in (grad, source, result))
            of_x, *of_norm = torch.ops.aten.native_layer_norm_backward(
                grad, source, source.shape[-1:], mean, rstd, weight, bias, mask
            )
            result.copy_(of_x)
            grad_norms += of_norm
        return grad_qkv, None, None, None, None, *grad_norms


def _heads_of(qkv: Tensor, heads: int) -> Sequence[Tensor]:
    """Return q, k, v (b, h, n, e), as views of their joint product (b, n, 3 d)."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class GeluProduct(torch.autograd.Function):
    """gelu(x)·Wᵀ + bias; only x is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x, approximate=GELU), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grad.flatten(0, -2)
        grad_weight = grad.t() @ F.gelu(x, approximate=GELU).flatten(0, -2) if needs_weight else None
        grad_x = None
        if needs_x:
            inner = (grad @ weight).view(x.shape)
            grad_x = torch.ops.aten.gelu_backward.grad_input(inner, x, approximate=GELU, grad_input=inner)
        return grad_x, grad_weight, grad.sum(0) if needs_bias else None
