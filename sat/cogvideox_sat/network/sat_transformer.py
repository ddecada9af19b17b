"""Build SwissArmyTransformer's stack of layers, which the mixins of CogVideoX adapt."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from sat.model.transformer import BaseTransformer
from sat.transformer_defaults import ARGS_DEFAULT
from torch import Tensor, nn

from cogvideox_sat.configuration.recomputation import recomputation_mode

# Tokens come from patches, so that the vocabulary and its positions are as small as possible.
DEFAULTS = {"vocab_size": 1, "max_sequence_length": 64, "layernorm_order": "pre", "skip_init": False}


def gelu_tanh(x: Tensor) -> Tensor:
    """Return gelu(x) in its tanh approximation."""
    return F.gelu(x, approximate="tanh")


def build_transformer(
    hidden_size: int, num_layers: int, num_attention_heads: int, transformer_args: Mapping[str, Any]
) -> BaseTransformer:
    """Return the layers.

    `BaseModel` would build the same, but reseed the global random generators.

    Args:
        transformer_args: arguments of SwissArmyTransformer; those that are None have their defaults.

    Raises:
        UserError: `checkpoint_activations` is invalid.
    """
    given = DEFAULTS | {name: value for name, value in transformer_args.items() if value is not None}
    given["checkpoint_activations"] = recomputation_mode(
        "checkpoint_activations", given.get("checkpoint_activations", False)
    )
    settings = {name: given.get(argument, default) for name, (argument, default) in ARGS_DEFAULT.items()}
    # `ActivationCheckpointing` replaces the loop over layers for which SwissArmyTransformer's constructor checks these.
    settings |= {"checkpoint_num_layers": 1, "checkpoint_skip_layers": 0}
    settings["row_parallel_linear_final_bias"] = False  # the bias is added within the matrix product
    transformer = BaseTransformer(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        **{name: given[name] for name in DEFAULTS},
        layernorm=nn.LayerNorm,
        activation_func=gelu_tanh,
        **settings,
    )
    transformer.checkpoint_skip_layers = given.get("checkpoint_skip_layers", 0)
    return transformer
