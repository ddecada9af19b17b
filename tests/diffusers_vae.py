"""The video autoencoder of diffusers with the weights of ours, as an independent implementation to compare with."""

from torch import nn

from sgm import diffusers_vae_names


def diffusers_name(name: str) -> str:
    """Ours or diffusers' name of a tensor as diffusers'."""
    return diffusers_vae_names.diffusers_name(name, levels=4)


def as_diffusers(vae: nn.Module, ch: int, num_res_blocks: int, z_channels: int, whole_clip: bool = True) -> nn.Module:
    """Return an AutoencoderKLCogVideoX with the weights of `vae`, whose channel multiples are 1, 2, 2, 4.

    With `whole_clip` the network encodes a clip at once, as ours does. Without `whole_clip` the network is as diffusers
    makes it, and encodes slices of eight frames, which need less memory and have norms of their own: latents differ.
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
    if whole_clip:
        other.num_sample_frames_batch_size = 1 << 20
    return other.eval()
