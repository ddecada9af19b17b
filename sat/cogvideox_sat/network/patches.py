"""Latents and text become tokens before the layers; after them, tokens become latents.

Both classes are mixins for SwissArmyTransformer: methods with the names of its hooks replace functions of the
transformer.
Shapes: b batch, t latent frames, c channels, h and w latent height and width, d `hidden_size`, l text tokens, n = l + v
tokens, of which v = (t/o)·(h/p)·(w/q) belong to the video, (o, p, q) the patch.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from sat.model.base_model import BaseMixin, BaseModel
from torch import Tensor, nn

from cogvideox_sat.latent_geometry import Grid, patch_sizes
from cogvideox_sat.network.adaptive_layer import LAYERNORM_EPSILON
from cogvideox_sat.network.sequence_parallel import TokenShare
from cogvideox_sat.network.token_arithmetic import modulate


class ImagePatchEmbeddingMixin(BaseMixin):
    """Projects video patches and text states to tokens (b, n, d), text first.

    The projection is stored as a Conv2d kernel if only space is patched (1.0), and as a Linear weight if time is
    patched, too (1.5). Both are applied as one matrix product on features ordered (c o p q).

    Args:
        patch_size: see `patch_sizes`.
        text_hidden_size: width of the text states.
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
        """Initialize the projection as a linear layer of a patch's values.

        Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks", eq. 16.
        """
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
        """Set the last projections to zero, so that initially the network predicts zero."""
        for linear in (self.linear, self.adaLN_modulation[1]):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def final_forward(
        self, logits: Tensor, *, emb: Tensor, grid: Grid, text_length: int, share: TokenShare | None = None, **_: Any
    ) -> Tensor:
        """Return the latents (b, t, out_channels, h, w).

        Args:
            logits: tokens (b, n, d), text first; with a `share` those of this process.
            emb: (b, time_embed_dim).
            grid: patches of the whole video along (t, h, w).
        """
        shift, scale = self.adaLN_modulation(emb).unsqueeze(1).chunk(2, dim=-1)
        x = self.linear(modulate(self.norm_final(logits[:, text_length:]), shift, scale))
        if share is not None:
            x = share.gather_video(x)
        (t, h, w), (o, p, q) = grid, self.patch
        return rearrange(x, "b (t h w) (c o p q) -> b (t o) c (h p) (w q)", t=t, h=h, w=w, o=o, p=p, q=q)
