"""The video autoencoder of diffusers with the weights of ours, as an independent implementation to compare with."""

import re

from torch import nn

# our name -> diffusers' name; the decoder's levels are numbered from the other end
RENAMES = [
    (r"down\.(\d)\.block", r"down_blocks.\1.resnets"),
    (r"down\.(\d)\.downsample", r"down_blocks.\1.downsamplers.0"),
    (r"up\.(\d)\.block", lambda m: f"up_blocks.{3 - int(m[1])}.resnets"),
    (r"up\.(\d)\.upsample", lambda m: f"up_blocks.{3 - int(m[1])}.upsamplers.0"),
    (r"mid\.block_1", "mid_block.resnets.0"),
    (r"mid\.block_2", "mid_block.resnets.1"),
    (r"nin_shortcut", "conv_shortcut"),
]


def diffusers_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def as_diffusers(vae: nn.Module, ch: int, num_res_blocks: int, z_channels: int) -> nn.Module:
    """AutoencoderKLCogVideoX with the weights of `vae`, whose channel multiples are 1, 2, 2, 4.

    It encodes a clip at once, as ours does; by default it would cut clips into pieces of eight frames.
    """
    from diffusers import AutoencoderKLCogVideoX

    other = AutoencoderKLCogVideoX(
        block_out_channels=(ch, 2 * ch, 2 * ch, 4 * ch),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        layers_per_block=num_res_blocks,
        latent_channels=z_channels,
    )
    other.load_state_dict({diffusers_name(name): value for name, value in vae.state_dict().items()})
    other.num_sample_frames_batch_size = 1 << 20
    return other.eval()
