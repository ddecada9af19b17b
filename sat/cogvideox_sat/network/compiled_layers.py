"""Run the layers of a network through `block`, which is compiled once for all layers.

If the network has parts that `block` does not support (a user's own mixin, quantised products, layers shared by several
processes, dropout), its layers run without a compiler.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from sat import mpu
from sat.mpu import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from cogvideox_sat.network.activation_checkpointing import keeping_attention
from cogvideox_sat.network.block import Attend, LayerWeights, LowRank, Norm, Product, Tokens, block
from cogvideox_sat.network.fused_lora import FusedLoraLinear
from cogvideox_sat.network.layer_runner import RunLayer
from cogvideox_sat.network.sequence_parallel import TokenShare
from sgm.attention_kernels import KERNELS, AttentionKernel
from sgm.compilation import compiler_errors, go_on_without_compiler
from sgm.flash_attention3 import FLASH3

# Subclasses with the same `forward` are supported, too.
PLAIN = (ColumnParallelLinear.forward, RowParallelLinear.forward, nn.Linear.forward)


class NotCompilable(Exception):
    """Raised, with the reason, if a layer has a part that `block` does not support."""


@cache
def compiled_block() -> Callable[..., Tensor]:
    """Return `block`, compiled at its first call; all networks of a process share its graphs."""
    return torch.compile(block, fullgraph=True)


@cache
def compiled_keeping_block() -> Callable[..., Tensor]:
    """Return `block`, compiled to keep only its input and attention for a backward pass."""
    return torch.compile(_keeping_block, fullgraph=True)


def _keeping_block(x: Tensor, modulation: Tensor, *others: Any) -> Tensor:
    return keeping_attention(lambda *tensors: block(*tensors, *others), x, modulation)


def compiled_layers(
    network: nn.Module,
    emb: Tensor,
    tokens: Tokens,
    plain: Sequence[RunLayer],
    modulations: Tensor | None = None,
    share: TokenShare | None = None,
) -> list[RunLayer]:
    """Return the layers of a `DiffusionTransformer` as compiled functions of tokens (b, n, d).

    If the compiler fails, one line is logged, and the network runs without it from then on.

    Args:
        emb: time embedding (b, time_embed_dim), after its SiLU.
        plain: the layers without a compiler.
        modulations: (layers, b, 12 d) for `emb`, if already computed.
        share: this process's share of the tokens, if the network does not hold all of them.

    Raises:
        NotCompilable: a layer has a part that is not supported.
    """
    check_network(network)
    linears = [modulation[1] for modulation in network.mixins["adaln_layer"].adaLN_modulations]
    known = modulations if modulations is not None else [partial(linear, emb) for linear in linears]
    attend = _attend(network.training_attention if torch.is_grad_enabled() else network.attention)
    if share is not None:
        attend = share.attend(attend)
    return [
        _compiled_layer(network, layer_id, known[layer_id], tokens, attend, layer)
        for layer_id, layer in enumerate(plain)
    ]


def _compiled_layer(
    network: nn.Module,
    layer_id: int,
    modulation: Tensor | Callable[[], Tensor],
    tokens: Tokens,
    attend: Attend,
    otherwise: RunLayer,
) -> RunLayer:
    weights = weights_of(network, layer_id)
    heads, kernel = network.num_attention_heads, network.attention_name
    chosen = network.checkpointing.recomputation(network.num_layers)
    keeps = network.training and torch.is_grad_enabled() and 0 <= layer_id - chosen.whole < chosen.attention

    def run(hidden: Tensor) -> Tensor:
        if not network.compiles_layers:  # the compiler failed for an earlier layer
            return otherwise(hidden)
        try:
            parts = modulation if isinstance(modulation, Tensor) else modulation()
            compiled = compiled_keeping_block if keeps else compiled_block
            return compiled()(hidden, parts, weights, tokens, heads, attend, kernel)
        except compiler_errors() as error:
            network.compiles_layers = False
            go_on_without_compiler(network, error)
            return keeping_attention(otherwise, hidden) if keeps else otherwise(hidden)

    return run


def _attend(kernel: AttentionKernel) -> Attend:
    """Return a kernel's function without its checks, which a compiler cannot trace."""
    known = kernel if kernel in (KERNELS["softmax"], FLASH3) else KERNELS["softmax"]
    return known.compute  # these two kernels support all inputs


def layer_weights(network: nn.Module, layer_id: int) -> LayerWeights:
    """Return the tensors of a layer.

    Raises:
        NotCompilable: the layer has a part that is not supported.
    """
    check_network(network)
    return weights_of(network, layer_id)


def check_network(network: nn.Module) -> None:
    """Check all modules of the network for unsupported parts, else raise NotCompilable."""
    if reason := network.why_layers_are_not_plain():
        raise NotCompilable(reason)
    if mpu.get_model_parallel_world_size() > 1:
        raise NotCompilable("several processes share the network")


def weights_of(network: nn.Module, layer_id: int) -> LayerWeights:
    """Return the same as `layer_weights`, for a network that `check_network` has checked."""
    layer, adaln = network.transformer.layers[layer_id], network.mixins["adaln_layer"]
    dropouts = (layer.attention.attention_dropout, layer.attention.output_dropout, layer.mlp.dropout)
    if network.training and any(dropout.p for dropout in dropouts):
        raise NotCompilable("it has dropout")
    if layer.mlp.is_gated_mlp or layer.mlp.num_experts > 1 or layer.attention.num_multi_query_heads:
        raise NotCompilable("its layers have parts that CogVideoX's layers do not have")
    has_norms = adaln.qk_ln
    return LayerWeights(
        attention_norm=norm(layer.input_layernorm),
        qkv=product(layer.attention.query_key_value),
        query_norm=norm(adaln.query_layernorm_list[layer_id]) if has_norms else None,
        key_norm=norm(adaln.key_layernorm_list[layer_id]) if has_norms else None,
        out=product(layer.attention.dense),
        mlp_norm=norm(layer.post_attention_layernorm),
        up=product(layer.mlp.dense_h_to_4h),
        down=product(layer.mlp.dense_4h_to_h),
    )


def norm(module: nn.Module) -> Norm:
    """Return the tensors of a layer norm; raise NotCompilable for another module."""
    if not isinstance(module, nn.LayerNorm) or type(module).forward is not nn.LayerNorm.forward:
        raise NotCompilable(f"its norms are {type(module).__name__}")
    return Norm(module.weight, module.bias, module.eps)


def product(module: nn.Module) -> Product:
    """Return the tensors of a matrix product and its adapter, else raise NotCompilable."""
    if isinstance(module, FusedLoraLinear) and type(module).forward is FusedLoraLinear.forward:
        if module.training and isinstance(module.lora_dropout, nn.Dropout) and module.lora_dropout.p:
            raise NotCompilable("its adapter has dropout")
        adapter = LowRank(list(module.matrix_A), list(module.matrix_B), module.scaling)
        return product(module.original)._replace(adapter=adapter)
    if type(module).forward not in PLAIN or not module.weight.is_floating_point():
        raise NotCompilable(f"its products are {type(module).__name__}")
    return Product(module.weight, module.bias)
