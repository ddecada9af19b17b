"""diffusers' video autoencoder with our weights, an independent implementation."""

from torch import nn

from sgm import diffusers_vae_names


def diffusers_name(name: str) -> str:
    """Return diffusers' name of a tensor, from our name or diffusers'."""
    return diffusers_vae_names.diffusers_name(name, levels=4)


def as_diffusers(vae: nn.Module, ch: int, num_res_blocks: int, z_channels: int, whole_clip: bool = True) -> nn.Module:
    """Return an AutoencoderKLCogVideoX with the weights of `vae`.

    Its channel multiples are 1, 2, 2, 4.

    Args:
        whole_clip: encode a clip at once, as ours does. False: encode slices of eight frames, diffusers' default, which
            needs less memory; their norms are separate, so that latents differ.
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
