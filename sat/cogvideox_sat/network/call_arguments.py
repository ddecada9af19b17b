"""Check the arguments of a call of the network, and make those of its mixins of them.

Shapes: b batch, t latent frames, c channels, h and w latent height and width.
"""

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from cogvideox_sat.latent_geometry import Grid
from cogvideox_sat.network.sequence_parallel import TokenShare
from sgm.errors import UserError

# Keywords that denoisers and losses pass to every network.
HANDED_ON = ("idx", "scale_emb")


def join_condition(x: Tensor, condition: Tensor) -> Tensor:
    """Return `x` (b, t, c, h, w) with the channels of an image condition appended.

    Raises:
        UserError: the two differ in another dimension than channels.
    """
    if condition.ndim != 5 or (*x.shape[:2], *x.shape[3:]) != (*condition.shape[:2], *condition.shape[3:]):
        raise UserError(
            f"concat_images has the shape {tuple(condition.shape)}; beside latents of {tuple(x.shape)} it must be "
            "(b, t, channels, h, w) with the same b, t, h and w"
        )
    return torch.cat((x, condition.to(x.dtype)), dim=2)


def check_channels(x: Tensor, in_channels: int) -> None:
    """Check that latents (b, t, c, h, w), joined with their condition, have `in_channels`.

    Raises:
        UserError: they have another number of channels.
    """
    if x.shape[2] != in_channels:
        raise UserError(
            f"the latents have {x.shape[2]} channels, but this network takes {in_channels}; channels of an "
            "image condition (concat_images) count too"
        )


def patch_grid(latents: Tensor, patch: tuple[int, int, int], largest: Grid) -> Grid:
    """Return the number of patches along (t, h, w) of latents (b, t, c, h, w).

    Args:
        patch: size of a patch along (t, h, w).
        largest: number of patches for which the network has positions.

    Raises:
        UserError: the latents do not divide into patches, or exceed the largest grid.
    """
    size = (latents.shape[1], *latents.shape[3:])
    if any(s % p for s, p in zip(size, patch, strict=True)):
        raise UserError(f"latents of size {size} (frames, height, width) do not divide into patches of {patch}")
    grid = tuple(s // p for s, p in zip(size, patch, strict=True))
    if any(g > limit for g, limit in zip(grid, largest, strict=True)):
        limits = tuple(limit * p for limit, p in zip(largest, patch, strict=True))
        raise UserError(f"latents of size {size} (frames, height, width) exceed this model's {limits}")
    return grid


def foreign_arguments(keywords: Mapping[str, Any], own: Container[str], has_foreign_mixin: bool) -> dict[str, Any]:
    """Return the keywords of a call that are for foreign mixins.

    Args:
        own: names of the keywords that the network itself passes to mixins.
        has_foreign_mixin: the network has a mixin that is not CogVideoX's, and which may read any other keyword.

    Raises:
        TypeError: no foreign mixin is registered, or a keyword has the name of one that the network sets itself.
    """
    given = {name: value for name, value in keywords.items() if value is not None or name not in HANDED_ON}
    unknown = [name for name in given if name in own or not (has_foreign_mixin or name in HANDED_ON)]
    if unknown:
        known = ("x", "timesteps", "context", "y", "concat_images", "ofs", *HANDED_ON)
        raise TypeError(
            f"DiffusionTransformer.forward() got an unexpected keyword argument '{unknown[0]}'; it takes "
            f"{', '.join(known)}, and other keywords only if your own mixin is registered"
        )
    return given if has_foreign_mixin else {}


def own_arguments(arguments: Mapping[str, Any], share: TokenShare) -> dict[str, Any]:
    """Return the arguments that differ for a process which has a share of the tokens.

    Args:
        arguments: those for all tokens of the call.
    """
    rotary = arguments["rotary"]
    return {
        "share": share,
        "text_length": share.own_text,
        "rotary": rotary and tuple(map(share.own_rows, rotary)),
    }
