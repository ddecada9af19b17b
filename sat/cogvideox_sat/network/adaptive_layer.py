"""The transformer layer: adaptive layer norms and gates, controlled by the time embedding.

The class is a mixin for SwissArmyTransformer: methods with the names of its hooks replace functions of the transformer.
Shapes: b batch, n tokens (text first), d `hidden_size`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sat.model.base_model import BaseMixin, BaseModel, non_conflict
from torch import Tensor, nn

from cogvideox_sat.network.token_arithmetic import add_gated, joined, modulate

# For the norms that mixins define. SwissArmyTransformer's norms use `layernorm_epsilon` of `transformer_args` (1e-5).
LAYERNORM_EPSILON = 1e-6


class AdaLNMixin(BaseMixin):
    """A pre-norm layer with norms modulated and branches gated by the time embedding.

    Vision and text share weights, but have their own shift, scale and gate ("expert adaptive layer norm").

    Args:
        hidden_size_head: channels per head.
        qk_ln: normalise queries and keys over the channels of a head, before the rotary embedding (arXiv:2302.05442).
        elementwise_affine: these norms have a weight and a bias.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        time_embed_dim: int,
        hidden_size_head: int,
        qk_ln: bool = True,
        elementwise_affine: bool = True,
    ):
        super().__init__()
        self.adaLN_modulations = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(time_embed_dim, 12 * hidden_size)) for _ in range(num_layers)
        )
        self.qk_ln = qk_ln
        if qk_ln:

            def norms() -> nn.ModuleList:
                return nn.ModuleList(
                    nn.LayerNorm(hidden_size_head, eps=LAYERNORM_EPSILON, elementwise_affine=elementwise_affine)
                    for _ in range(num_layers)
                )

            self.query_layernorm_list, self.key_layernorm_list = norms(), norms()

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        """Set the modulation to zero, so that initially every layer is the identity.

        This is adaLN-Zero (arXiv:2212.09748).
        """
        for modulation in self.adaLN_modulations:
            nn.init.zeros_(modulation[1].weight)
            nn.init.zeros_(modulation[1].bias)

    def layer_forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        *,
        layer_id: int,
        emb: Tensor,
        text_length: int,
        modulations: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the tokens (b, n, d) after a layer.

        Args:
            hidden_states: (b, n, d), text first.
            emb: (b, time_embed_dim).
            modulations: (layers, b, 12 d) for `emb`, if already computed.
        """
        layer = self.transformer.layers[layer_id]
        split = (text_length, hidden_states.shape[1] - text_length)
        modulation = self.adaLN_modulations[layer_id](emb) if modulations is None else modulations[layer_id]
        chunks = modulation.unsqueeze(1).chunk(12, dim=-1)
        vision_attention, vision_mlp, text_attention, text_mlp = (chunks[i : i + 3] for i in range(0, 12, 3))

        def branch(
            x: Tensor,
            norm: nn.Module,
            run: Callable[[Tensor], Tensor],
            vision: Sequence[Tensor],
            text: Sequence[Tensor],
        ) -> Tensor:
            (shift, scale, gate), (text_shift, text_scale, text_gate) = vision, text
            normed = norm(x)
            t, v = normed.split(split, dim=1)
            update = run(joined(normed, modulate(t, text_shift, text_scale), modulate(v, shift, scale)))
            (t, v), (text_update, update) = x.split(split, dim=1), update.split(split, dim=1)
            return joined(x, add_gated(t, text_gate, text_update), add_gated(v, gate, update))

        attention = partial(layer.attention, mask=mask, layer_id=layer_id, text_length=text_length, **kwargs)
        mlp = partial(layer.mlp, layer_id=layer_id)
        x = branch(hidden_states, layer.input_layernorm, attention, vision_attention, text_attention)
        return branch(x, layer.post_attention_layernorm, mlp, vision_mlp, text_mlp)

    @non_conflict
    def attention_fn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropout: nn.Module | None = None,
        *,
        layer_id: int,
        old_impl: Callable[..., Tensor],
        **kwargs: Any,
    ) -> Tensor:
        """Return the attention `old_impl` of normalised queries and keys (b, heads, n, head_dim)."""
        if self.qk_ln:
            q = self.query_layernorm_list[layer_id](q)
            k = self.key_layernorm_list[layer_id](k)
        return old_impl(q, k, v, mask, dropout, layer_id=layer_id, **kwargs)
