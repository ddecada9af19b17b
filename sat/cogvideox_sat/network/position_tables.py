"""Tables of the two 3D position embeddings: absolute sin-cos and rotary.

The patches of a grid of `frames × height × width` are numbered like the tokens, with the width index changing fastest.
"""

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from cogvideox_sat.latent_geometry import Grid


def sincos_1d(positions: np.ndarray, dim: int) -> np.ndarray:
    """Return sinusoids of `positions` (n,): float64 (n, dim), sines first, then cosines."""
    frequencies = 10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim / 2))
    angles = positions[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_3d(
    dim: int,
    grid: Grid,
    time_interpolation: float = 1.0,
    height_interpolation: float = 1.0,
    width_interpolation: float = 1.0,
) -> Tensor:
    """Return the sin-cos position embedding, float32 (frames·height·width, dim).

    The first quarter of the features encodes time, the rest space: first the width, then the height, in equal shares.
    Dividing the coordinates by an interpolation factor stretches a table that was learnt at a lower resolution.
    """
    frames, height, width = grid
    time_dim, axis_dim = dim // 4, dim * 3 // 8
    lines = (
        sincos_1d(np.arange(frames) / time_interpolation, time_dim),
        sincos_1d(np.arange(height) / height_interpolation, axis_dim),
        sincos_1d(np.arange(width) / width_interpolation, axis_dim),
    )
    time, rows, columns = (line.astype(np.float32) for line in lines)  # converted before they are repeated, while small
    table = np.concatenate(
        [
            repeat(time, "t d -> (t h w) d", h=height, w=width),
            repeat(columns, "w d -> (t h w) d", t=frames, h=height),
            repeat(rows, "h d -> (t h w) d", t=frames, w=width),
        ],
        axis=1,
    )
    return torch.from_numpy(table)


def rotary_angles(
    head_dim: int, grid: Grid, theta: float = 10000.0, device: torch.device | str | None = None
) -> Tensor:
    """Return the rotary angles of all patches, float32 (frames·height·width, head_dim).

    A quarter of the features rotates with time, three eighths with height and three eighths with width. Both members of
    a pair have the same angle (RoFormer, arXiv:2104.09864, in its interleaved form).
    """
    axes = []
    for size, dim in zip(grid, (head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8), strict=True):
        frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
        positions = torch.arange(size, dtype=torch.float32, device=device)
        axes.append((positions[:, None] * frequencies).repeat_interleave(2, dim=1))
    (frames, height, width), (time, rows, columns) = grid, axes
    return torch.cat(
        [
            repeat(time, "t d -> (t h w) d", h=height, w=width),
            repeat(rows, "h d -> (t h w) d", t=frames, w=width),
            repeat(columns, "w d -> (t h w) d", t=frames, h=height),
        ],
        dim=1,
    )


def leading_corner(table: Tensor, table_grid: Grid, grid: Grid) -> Tensor:
    """Return the rows of `table` for its leading corner of size `grid`.

    Args:
        table: (…, frames·height·width, d) of a grid `table_grid`.
    """
    if grid == table_grid:
        return table
    frames, height, width = table_grid
    table = rearrange(table, "... (t h w) d -> ... t h w d", t=frames, h=height, w=width)
    frames, height, width = grid
    return table[..., :frames, :height, :width, :].flatten(-4, -2)
