"""The parts of the network that are CogVideoX's own, in the order of the data flow.

Patch embedding, position embedding, adaptive layer norm with QK norm, final layer. They are mixins for
SwissArmyTransformer: their hooks, methods with fixed names, replace functions of the transformer.

Shapes: b batch, t latent frames, c channels, h and w latent height and width, d `hidden_size`, l text tokens, n = l + v
tokens, of which v = (t/o)·(h/p)·(w/q) belong to the video, (o, p, q) the patch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from sat.model.base_model import BaseMixin, BaseModel, non_conflict
from torch import Tensor, nn

from cogvideox_sat.latent_geometry import Grid, patch_sizes
from cogvideox_sat.network.position_tables import leading_corner, rotary_angles, sincos_3d
from cogvideox_sat.network.sequence_parallel import TokenShare
from cogvideox_sat.network.token_arithmetic import add_gated, apply_rotary, joined, modulate
from sgm.errors import UserError

# For the norms defined here. SwissArmyTransformer's norms use `layernorm_epsilon` of `transformer_args` (1e-5).
LAYERNORM_EPSILON = 1e-6

# Patch embedding


class ImagePatchEmbeddingMixin(BaseMixin):
    """Projects video patches and text states to tokens (b, n, d), text first.

    The projection is stored as a Conv2d kernel if only space is patched (1.0), and as a Linear weight if time is
    patched, too (1.5). Both are applied as one matrix product on features ordered (c o p q).
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        patch_size: int | Sequence[int],
        text_hidden_size: int,
        bias: bool = True,
    ):
        super().__init__()
        self.patch = o, p, q = patch_sizes(patch_size)
        if isinstance(patch_size, int):
            self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=(p, q), stride=(p, q), bias=bias)
        else:
            self.proj = nn.Linear(in_channels * o * p * q, hidden_size, bias=bias)
        self.text_proj = nn.Linear(text_hidden_size, hidden_size)

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        del self.transformer.word_embeddings  # tokens come from patches, not from a vocabulary
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.weight.shape[0], -1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def word_embedding_forward(
        self, input_ids: Tensor | None, *, images: Tensor, encoder_outputs: Tensor, **_: Any
    ) -> Tensor:
        """Return the tokens (b, n, d).

        Args:
            images: (b, t, c, h, w).
            encoder_outputs: text states (b, l, text_hidden_size).
        """
        o, p, q = self.patch
        patches = rearrange(images, "b (t o) c (h p) (w q) -> b (t h w) (c o p q)", o=o, p=p, q=q)
        video = F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        return torch.cat((self.text_proj(encoder_outputs), video), dim=1)


# Position embedding


class Basic3DPositionEmbeddingMixin(BaseMixin):
    """Absolute sin-cos positions, added to the video tokens; zeros for text.

    They are frozen, but part of the state dict.
    """

    def __init__(
        self,
        height: int,
        width: int,
        compressed_num_frames: int,
        hidden_size: int,
        text_length: int,
        time_interpolation: float = 1.0,
        height_interpolation: float = 1.0,
        width_interpolation: float = 1.0,
    ):
        super().__init__()
        self.grid: Grid = (compressed_num_frames, height, width)
        self.text_length = text_length
        video = sincos_3d(hidden_size, self.grid, time_interpolation, height_interpolation, width_interpolation)
        self.pos_embedding = nn.Parameter(F.pad(video, (0, 0, text_length, 0))[None], requires_grad=False)

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        del self.transformer.position_embeddings

    def position_embedding_forward(
        self, position_ids: Tensor | None, *, grid: Grid, text_length: int, **_: Any
    ) -> Tensor:
        text, video = self.pos_embedding[:, :text_length], self.pos_embedding[:, self.text_length :]
        return torch.cat((text, leading_corner(video, self.grid, grid)), dim=1)

    def rotary(self, grid: Grid, like: Tensor) -> None:
        return None


class Rotary3DPositionEmbeddingMixin(BaseMixin):
    """Rotary positions for queries and keys of video tokens, and optional learnt positions.

    The learnt positions are absolute. Checkpoints of 1.0 models contain the cosines and sines (`store_tables`); those
    of 1.5 models do not.
    """

    def __init__(
        self,
        height: int,
        width: int,
        compressed_num_frames: int,
        hidden_size: int,
        hidden_size_head: int,
        text_length: int,
        theta: float = 10000.0,
        learnable_pos_embed: bool = False,
        store_tables: bool = True,
        time_interpolation: float = 1.0,
        height_interpolation: float = 1.0,
        width_interpolation: float = 1.0,
    ):
        super().__init__()
        if not time_interpolation == height_interpolation == width_interpolation == 1:
            raise UserError(
                "interpolation factors: rotary positions take only 1; use Basic3DPositionEmbeddingMixin for others"
            )
        self.grid: Grid = (compressed_num_frames, height, width)
        self.text_length = text_length
        self.head_dim, self.theta = hidden_size_head, theta
        self.store_tables = store_tables
        if store_tables:
            angles = rotary_angles(hidden_size_head, self.grid, theta)
            self.register_buffer("freqs_sin", angles.sin())
            self.register_buffer("freqs_cos", angles.cos())
        self.pos_embedding = None
        if learnable_pos_embed:
            tokens = text_length + compressed_num_frames * height * width
            self.pos_embedding = nn.Parameter(torch.zeros(1, tokens, hidden_size))

    def position_embedding_forward(
        self, position_ids: Tensor | None, *, grid: Grid, text_length: int, **_: Any
    ) -> Tensor | None:
        if self.pos_embedding is None:
            return None
        text, video = self.pos_embedding[:, :text_length], self.pos_embedding[:, self.text_length :]
        return torch.cat((text, leading_corner(video, self.grid, grid)), dim=1)

    def rotary(self, grid: Grid, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (v, head_dim) of the leading corner of size `grid`.

        They have the dtype of `like`.
        """
        if self.store_tables:
            return tuple(
                leading_corner(table, self.grid, grid).to(like.dtype) for table in (self.freqs_cos, self.freqs_sin)
            )
        angles = rotary_angles(self.head_dim, grid, self.theta, like.device)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    @non_conflict
    def attention_fn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropout: nn.Module | None = None,
        *,
        rotary: tuple[Tensor, Tensor],
        old_impl: Callable[..., Tensor],
        **kwargs: Any,
    ) -> Tensor:
        cos, sin = rotary
        return old_impl(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, mask, dropout, **kwargs)


# Transformer layer


class AdaLNMixin(BaseMixin):
    """A pre-norm layer with norms modulated and branches gated by the time embedding.

    Vision and text share weights, but have their own shift, scale and gate ("expert adaptive layer norm"). `qk_ln`
    normalises queries and keys over the head dimension, before the rotary embedding.
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
        if self.qk_ln:
            q = self.query_layernorm_list[layer_id](q)
            k = self.key_layernorm_list[layer_id](k)
        return old_impl(q, k, v, mask, dropout, layer_id=layer_id, **kwargs)


# Final layer


class FinalLayerMixin(BaseMixin):
    """Modulated norm, projection and unpatchify.

    Tokens (b, n, d) become latents (b, t, out_channels, h, w).
    """

    def __init__(
        self,
        hidden_size: int,
        time_embed_dim: int,
        patch_size: int | Sequence[int],
        out_channels: int,
        elementwise_affine: bool = True,
    ):
        super().__init__()
        self.patch = o, p, q = patch_sizes(patch_size)
        self.norm_final = nn.LayerNorm(hidden_size, eps=LAYERNORM_EPSILON, elementwise_affine=elementwise_affine)
        self.linear = nn.Linear(hidden_size, o * p * q * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(time_embed_dim, 2 * hidden_size))

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        for linear in (self.linear, self.adaLN_modulation[1]):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def final_forward(
        self, logits: Tensor, *, emb: Tensor, grid: Grid, text_length: int, share: TokenShare | None = None, **_: Any
    ) -> Tensor:
        shift, scale = self.adaLN_modulation(emb).unsqueeze(1).chunk(2, dim=-1)
        x = self.linear(modulate(self.norm_final(logits[:, text_length:]), shift, scale))
        if share is not None:
            x = share.gather_video(x)
        (t, h, w), (o, p, q) = grid, self.patch
        return rearrange(x, "b (t h w) (c o p q) -> b (t o) c (h p) (w q)", t=t, h=h, w=w, o=o, p=p, q=q)
