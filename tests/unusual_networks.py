"""Changes of a network that the layers' fast functions do not support.

The changes run by SwissArmyTransformer's hooks.
"""

from sat.model.finetune.lora2 import LoraMixin
from torch import nn


class Mine(LoraMixin):
    """A user's mixin."""


def with_foreign_mixin(built: nn.Module) -> None:
    built.add_mixin("mine", Mine(built.num_layers, 2), reinit=False)


def with_watched_module(built: nn.Module) -> None:
    built.transformer.layers[1].mlp.register_forward_hook(lambda *_: None)


def with_dropout(built: nn.Module) -> None:
    built.train().transformer.layers[0].mlp.dropout.p = 0.1


def with_other_norm(built: nn.Module) -> None:
    built.transformer.layers[0].input_layernorm = nn.Identity()
