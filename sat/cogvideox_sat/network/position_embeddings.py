"""The two position embeddings: sin-cos positions that are added, and rotary positions.

Both are mixins for SwissArmyTransformer: methods with the names of its hooks replace functions of the transformer.
Shapes: n tokens (text first), v of them of the video, d `hidden_size`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sat.model.base_model import BaseMixin, BaseModel, non_conflict
from torch import Tensor, nn

from cogvideox_sat.latent_geometry import Grid
from cogvideox_sat.network.position_tables import leading_corner, rotary_angles, sincos_3d
from cogvideox_sat.network.token_arithmetic import apply_rotary
from sgm.errors import UserError


def positions_of_call(table: Tensor, table_text: int, table_grid: Grid, text: int, grid: Grid) -> Tensor:
    """Return the positions (1, n, d) of a call with `text` text tokens and a video of `grid`.

    A smaller video has the positions of the leading corner of the largest one; they are not stretched.

    Args:
        table: (1, table_text + v, d), for `table_text` text tokens and a video of `table_grid`.
    """
    video = leading_corner(table[:, table_text:], table_grid, grid)
    return torch.cat((table[:, :text], video), dim=1)


class Basic3DPositionEmbeddingMixin(BaseMixin):
    """Absolute sin-cos positions, added to the video tokens; zeros for text.

    They are frozen, but part of the state dict.

    Args:
        height, width, compressed_num_frames: the largest video, in patches.
        text_length: largest number of text tokens.
        time_interpolation, height_interpolation, width_interpolation: see `sincos_3d`.
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
        """Remove the transformer's learnt positions, which these replace."""
        del self.transformer.position_embeddings

    def position_embedding_forward(
        self, position_ids: Tensor | None, *, grid: Grid, text_length: int, **_: Any
    ) -> Tensor:
        """Return the positions (1, n, d), which are added to the tokens."""
        return positions_of_call(self.pos_embedding, self.text_length, self.grid, text_length, grid)

    def rotary(self, grid: Grid, like: Tensor) -> None:
        """Return None: queries and keys are not rotated."""


class Rotary3DPositionEmbeddingMixin(BaseMixin):
    """Rotary positions for queries and keys of video tokens, and optional learnt positions.

    The learnt positions are absolute. Checkpoints of 1.0 models contain the cosines and sines (`store_tables`); those
    of 1.5 models do not.

    Args:
        height, width, compressed_num_frames: the largest video, in patches.
        hidden_size_head: channels per head.
        text_length: largest number of text tokens.
        theta: see `rotary_angles`.
        learnable_pos_embed: add learnt positions to the tokens too.
        time_interpolation, height_interpolation, width_interpolation: accepted at 1.

    Raises:
        UserError: an interpolation factor is not 1.
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
        """Return the learnt positions (1, n, d), which are added to the tokens, or None."""
        if self.pos_embedding is None:
            return None
        return positions_of_call(self.pos_embedding, self.text_length, self.grid, text_length, grid)

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
        """Return the attention `old_impl` of rotated queries and keys (b, heads, n, head_dim).

        Args:
            rotary: cosines and sines (v, head_dim).
        """
        cos, sin = rotary
        return old_impl(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, mask, dropout, **kwargs)
