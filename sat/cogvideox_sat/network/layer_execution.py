"""Run the layers of the network: compiled, in parts that keep little memory, or by hooks.

The results are equal. Compiled layers are fastest. Without a compiler, parts that keep little for the backward pass
save memory in training. SwissArmyTransformer's hooks alone support layers that a user has changed.
Shapes: b batch, n tokens (text first), d width.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from sat.model.base_model import BaseModel
from sat.model.transformer import BaseTransformer
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cogvideox_sat.configuration.video_layout import check_shares
from cogvideox_sat.network import adaptive_layer, patches, position_embeddings
from cogvideox_sat.network.activation_checkpointing import ActivationCheckpointing
from cogvideox_sat.network.attention_choice import AttentionChoice
from cogvideox_sat.network.block import tokens_of
from cogvideox_sat.network.compiled_layers import NotCompilable, compiled_layers, layer_weights
from cogvideox_sat.network.layer_runner import LayerContext, LayerRunner, RunLayer
from cogvideox_sat.network.lean_layers import lean_layers
from cogvideox_sat.network.modulation_table import ModulationTable
from cogvideox_sat.network.sequence_parallel import TokenShare
from sgm.attention_kernels import KERNELS

# The modules of CogVideoX's mixins and of SwissArmyTransformer's adapter, whose import has side effects.
OWN_MIXINS = (
    *(patches.__name__, position_embeddings.__name__, adaptive_layer.__name__),
    "sat.model.finetune.lora2",
)


class LayerExecution(BaseModel):
    """The base of `DiffusionTransformer`: what its layers are made of, and how they run.

    Attributes:
        layer_runner: the functions around every layer.
        attention, training_attention: kernels without and with gradients, and `attention_name` of the first.
        compiles_layers: layers run compiled; see `compile_layers`.
        modulation_table: see `tabulate_modulations`.
        sequence_group, sequence_processes: the processes that share the tokens of a call, and their number.
        has_foreign_mixin: a mixin is neither CogVideoX's nor an adapter; it may read any keyword of a call.
    """

    def __init__(self, transformer: BaseTransformer, num_layers: int, num_attention_heads: int):
        super().__init__(None, transformer=transformer)
        self.num_layers, self.num_attention_heads = num_layers, num_attention_heads
        self.checkpointing = ActivationCheckpointing(transformer)
        self.layer_runner = LayerRunner([self.checkpointing])
        self.use_attention(None)
        self.compiles_layers = False
        self.modulation_table: ModulationTable | None = None
        self.sequence_group: ProcessGroup | None = None
        self.sequence_processes = 1

    def use_attention(self, choice: AttentionChoice | None) -> None:
        """Compute attention with another kernel from now on; None: PyTorch's choice."""
        self.attention, self.training_attention = KERNELS["softmax"], KERNELS["written-out"]
        self.attention_name = "softmax"
        others = tuple(each for each in self.layer_runner.around if not isinstance(each, AttentionChoice))
        self.layer_runner.around = others
        if choice is not None:
            self.attention_name = choice.kernel
            if choice.function is not None:
                self.attention = self.training_attention = choice.function
            if choice.backends:
                self.layer_runner.around = (*others, choice)

    def share_tokens(self, group: ProcessGroup | None) -> None:
        """Hold only a share of the tokens of each call from now on.

        The other processes of the group hold the other shares. All of them must be called with the same inputs, and
        return the same.

        Args:
            group: the group of processes. None: hold all tokens.

        Raises:
            UserError: the group has more processes than the network has heads.
        """
        if group is not None:
            check_shares(group.size(), "attention heads", self.num_attention_heads)
        self.sequence_group, self.sequence_processes = group, 1 if group is None else group.size()

    def compile_layers(self) -> bool:
        """Compile the layers from now on; return False and change nothing if that is impossible.

        Layers in which an unsupported part for `network.compiled_layers` is found later run without a compiler.
        """
        with suppress(NotCompilable):
            layer_weights(self, 0)
            self.compiles_layers = True
        return self.compiles_layers

    def tabulate_modulations(self, device: torch.device) -> bool:
        """Compute modulations in advance for sampling, with their weights in host memory.

        Return False, and change nothing, if layers may use these weights in another way.

        Args:
            device: device on which the network runs.
        """
        if self.why_layers_are_not_plain() is None:
            self.modulation_table = ModulationTable(self.mixins["adaln_layer"].adaLN_modulations, device)
        return self.modulation_table is not None

    def why_layers_are_not_plain(self) -> str | None:
        """Return why layers may compute something else than `network.block`, or None."""
        if self.has_foreign_mixin:
            return "it has a mixin that is not defined here"
        own = (LayerExecution.attention_fn, LayerExecution.layer)
        if (type(self).attention_fn, type(self).layer) != own:
            return f"{type(self).__name__} runs its layers in its own way"
        if self.transformer.layernorm_order != "pre":
            return f"its layernorm_order is {self.transformer.layernorm_order}"
        watched = (self.transformer.layers, self.mixins["adaln_layer"])
        if any(each._forward_hooks or each._forward_pre_hooks for part in watched for each in part.modules()):
            return "its modules have hooks, as with ZeRO-3"
        return None

    def collect_hooks_(self) -> dict[str, Any]:
        """Collect the hooks of the mixins, as SwissArmyTransformer does after each change."""
        hooks = super().collect_hooks_()
        if hasattr(self, "transformer"):  # sub-layers look up their hooks there
            self.transformer.hooks.clear()
            self.transformer.hooks.update(hooks)
        self.has_foreign_mixin = any(type(mixin).__module__ not in OWN_MIXINS for mixin in self.mixins.values())
        return hooks

    def attention_fn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropout: nn.Dropout | None = None,
        *,
        share: TokenShare | None = None,
        **_: Any,
    ) -> Tensor:
        """Return full attention of q, k, v (b, heads, n, head_dim), without a mask."""
        dropout_p = dropout.p if dropout is not None else 0.0
        if share is not None:
            kernel = self.training_attention if torch.is_grad_enabled() else self.attention
            return share.attend(kernel)(q, k, v, dropout_p=dropout_p)
        if not torch.is_grad_enabled():
            return self.attention(q, k, v, dropout_p=dropout_p)
        # The backward pass keeps v. Since v is a view of q, k and v together, a copy allows the others to be freed.
        v = v.transpose(1, 2).contiguous().transpose(1, 2)
        return self.training_attention(q, k, v, dropout_p=dropout_p)

    def run_layers(self, hidden: Tensor, timesteps: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Return the tokens after all layers.

        Args:
            hidden: tokens (b, n, d) before the first layer.
            timesteps: (b,), of the noise levels.
            arguments: keywords of the mixins in this call.
        """
        layers, compiled = self.layers_of_call(arguments, hidden)
        for layer_id, run in enumerate(layers):
            context = LayerContext(
                layer_id,
                self.num_layers,
                timesteps,
                arguments["grid"],
                arguments["text_length"],
                self.training,
                self.layer_runner.sampling,
                keeps_attention=compiled and self.compiles_layers,
            )
            hidden = self.layer_runner(run, hidden, context)
        return hidden

    def layers_of_call(self, arguments: Mapping[str, Any], hidden: Tensor) -> tuple[list[RunLayer], bool]:
        """Return the layers as functions of the tokens, and whether they are compiled.

        Args: those of `run_layers`.
        """
        share = arguments.get("share")
        if self.compiles_layers:
            tokens = tokens_of(arguments["text_length"], hidden.shape[1], arguments["rotary"], hidden.device)
            emb, modulations = F.silu(arguments["emb"]), arguments.get("modulations")
            with suppress(NotCompilable):
                return compiled_layers(self, emb, tokens, self.layers_by_hooks(arguments), modulations, share), True
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling() and "modulations" not in arguments:
            with suppress(NotCompilable):
                emb = F.silu(arguments["emb"])
                return lean_layers(self, emb, arguments["text_length"], arguments["rotary"], share), False
        return self.layers_by_hooks(arguments), False

    def layers_by_hooks(self, arguments: Mapping[str, Any]) -> list[RunLayer]:
        """Return the layers as SwissArmyTransformer's hooks compute them."""
        return [self.layer(layer_id, arguments) for layer_id in range(self.num_layers)]

    def layer(self, layer_id: int, arguments: Mapping[str, Any]) -> RunLayer:
        """Return a layer as a function of the tokens (b, n, d) alone."""
        layer_forward = self.hooks["layer_forward"]
        return lambda hidden: layer_forward(hidden, None, layer_id=layer_id, **arguments)
