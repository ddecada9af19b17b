"""Weights of the 2D autoencoder by diffusers' names, to compare both implementations."""

import re
from collections.abc import Mapping

from torch import Tensor


def diffusers_name(name: str, levels: int) -> str:
    """Return diffusers' name of our parameter `name`.

    diffusers numbers the decoder's levels from the other end.
    """
    renames = [
        (r"down\.(\d)\.block", r"down_blocks.\1.resnets"),
        (r"down\.(\d)\.downsample", r"down_blocks.\1.downsamplers.0"),
        (r"up\.(\d)\.block", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.resnets"),
        (r"up\.(\d)\.upsample", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.upsamplers.0"),
        (r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}"),
        (r"mid\.attn_1\.norm", "mid_block.attentions.0.group_norm"),
        (r"mid\.attn_1\.proj_out", "mid_block.attentions.0.to_out.0"),
        (r"mid\.attn_1\.([qkv])", r"mid_block.attentions.0.to_\1"),
        (r"nin_shortcut", "conv_shortcut"),
        (r"norm_out", "conv_norm_out"),
    ]
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def diffusers_weights(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Return our weights as diffusers loads them.

    The attention of diffusers has linear layers instead of our 1x1 convolutions.
    """
    return {
        diffusers_name(name, levels): value[:, :, 0, 0] if "attn" in name and value.ndim == 4 else value
        for name, value in weights.items()
    }
