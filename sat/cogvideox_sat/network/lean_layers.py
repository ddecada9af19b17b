"""Run layers through `lean_functions` when gradients are needed and no compiler is used.

Layers with unsupported parts run through SwissArmyTransformer's hooks, as they do without gradients.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox_sat.network.block import Attend, LayerWeights, Norm, Product
from cogvideox_sat.network.compiled_layers import NotCompilable, check_network, weights_of
from cogvideox_sat.network.fused_lora import AddLowRank, autocasts
from cogvideox_sat.network.layer_runner import RunLayer
from cogvideox_sat.network.lean_functions import GatedSum, GeluProduct, Heads, ModulatedProduct
from cogvideox_sat.network.sequence_parallel import TokenShare

Rotary = tuple[Tensor, Tensor]


def lean_layers(
    network: nn.Module, emb: Tensor, text: int, rotary: Rotary | None, share: TokenShare | None = None
) -> list[RunLayer]:
    """Return the layers of a `DiffusionTransformer` as functions that keep little memory.

    The functions take and return tokens (b, n, d).

    Args:
        emb: time embedding (b, time_embed_dim), after its SiLU.
        text: number of text tokens.
        rotary: cosines and sines of the video tokens.
        share: this process's share of the tokens, if the network does not hold all of them; `text` and `rotary` are
            then those of the share.

    Raises:
        NotCompilable: a layer has a part that is not supported.
    """
    check_network(network)
    if autocasts(emb.device.type):
        raise NotCompilable("autocast chooses other dtypes")
    if any(parameter.dtype != emb.dtype for parameter in network.parameters()):
        raise NotCompilable("its weights have several dtypes")
    attend = network.training_attention if share is None else share.attend(network.training_attention)
    return [_lean_layer(network, layer_id, emb, text, rotary, attend) for layer_id in range(network.num_layers)]


def _lean_layer(
    network: nn.Module, layer_id: int, emb: Tensor, text: int, rotary: Rotary | None, attend: Attend
) -> RunLayer:
    weights = weights_of(network, layer_id)
    if weights.query_norm is None or weights.key_norm is None:
        raise NotCompilable("queries and keys have no norm")
    modulation = network.mixins["adaln_layer"].adaLN_modulations[layer_id][1]
    heads = network.num_attention_heads
    return lambda hidden: lean_layer(hidden, modulation(emb), weights, text, rotary, heads, attend)


def lean_layer(
    x: Tensor,
    modulation: Tensor,
    weights: LayerWeights,
    text: int,
    rotary: Rotary | None,
    heads: int,
    attend: Attend,
) -> Tensor:
    """Return the same as `block` for tokens x (b, n, d) and modulation (b, 12 d).

    Args:
        text: number of text tokens, which come first.
        rotary: cosines and sines (n - text, e) of the video tokens.
    """
    chunks = modulation[:, None].chunk(12, dim=-1)
    (shift1, scale1, gate1, shift2, scale2, gate2), of_text = chunks[:6], chunks[6:]
    cos, sin = rotary or (None, None)
    query, key = weights.query_norm, weights.key_norm
    assert query is not None and key is not None

    qkv = _modulated_product(x, weights.attention_norm, text, (*of_text[:2], shift1, scale1), weights.qkv)
    eps, norms = (query.eps, key.eps), (query.weight, query.bias, key.weight, key.bias)
    q, k, v = Heads.apply(qkv, heads, cos, sin, eps, *norms)
    del qkv
    update = _product(attend(q, k, v).transpose(1, 2).flatten(2), weights.out)
    del q, k, v
    x = GatedSum.apply(x, update, text, of_text[2], gate1)
    inner = _modulated_product(x, weights.mlp_norm, text, (*of_text[3:5], shift2, scale2), weights.up)
    if weights.down.adapter is None:
        update = GeluProduct.apply(inner, weights.down.weight, weights.down.bias)
    else:
        update = _product(F.gelu(inner, approximate="tanh"), weights.down)
    return GatedSum.apply(x, update, text, of_text[5], gate2)


def _modulated_product(x: Tensor, norm: Norm, text: int, modulation: Sequence[Tensor], product: Product) -> Tensor:
    scale, matrices = _adapter(product)
    return ModulatedProduct.apply(x, *norm, text, *modulation, product.weight, product.bias, scale, *matrices)


def _product(x: Tensor, product: Product) -> Tensor:
    scale, matrices = _adapter(product)
    if not matrices:
        return F.linear(x, product.weight, product.bias)
    return AddLowRank.apply(x, product.weight, product.bias, scale, *matrices)


def _adapter(product: Product) -> tuple[float, Sequence[Tensor]]:
    if product.adapter is None:
        return 1.0, ()
    return product.adapter.scale, (*product.adapter.down, *product.adapter.up)
