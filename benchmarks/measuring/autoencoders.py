"""The video autoencoders of `vae.py` and `vae_training.py`, ours and diffusers'.

Both have the same weights.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from diffusers_vae import as_diffusers
from measuring.vae_arguments import DEFAULTS, NETWORKS, OURS, WHOLE
from seeded import seed_module_, seeded_input
from vae_modules.autoencoder import VideoAutoencoderInferenceWrapper

LATENT_CHANNELS = 16
AT_ONCE = "decode all chunks at once"  # a task of ours


def autoencoder(size: str, **coder: object) -> VideoAutoencoderInferenceWrapper:
    """Return our autoencoder with the seeded weights of every benchmark.

    Args:
        coder: further options of encoder and decoder.
    """
    return seed_module_(_autoencoder(size, **coder))


def build_without_content(size: str, dtype: torch.dtype) -> VideoAutoencoderInferenceWrapper:
    """Return our autoencoder on the meta device, where tensors have no content."""
    with torch.device("meta"):
        return _autoencoder(size).to(dtype).eval()


def _autoencoder(size: str, **coder: object) -> VideoAutoencoderInferenceWrapper:
    params = {"z_channels": LATENT_CHANNELS, **NETWORKS[size], **coder}
    return VideoAutoencoderInferenceWrapper(
        encoder_config={"target": "vae_modules.cp_enc_dec.ContextParallelEncoder3D", "params": params},
        decoder_config={"target": "vae_modules.cp_enc_dec.ContextParallelDecoder3D", "params": params},
        regularizer_config={"target": "vae_modules.regularizers.DiagonalGaussianRegularizer"},
    )


def diffusers_autoencoder(size: str) -> torch.nn.Module:
    """Return diffusers' autoencoder with the same weights, at its defaults."""
    network = NETWORKS[size]
    ours = autoencoder(size)
    return as_diffusers(ours, network["ch"], network["num_res_blocks"], LATENT_CHANNELS, whole_clip=False)


def seeded_video(args: argparse.Namespace) -> torch.Tensor:
    return seeded_input("video", (1, 3, args.frames, args.height, args.width)).clamp(-1, 1)


def build(args: argparse.Namespace, *contenders: str) -> dict[str, dict[str, Callable[[], torch.Tensor]]]:
    """Return the tasks of each contender, as functions without arguments.

    They are encode, decode, and for ours `AT_ONCE`. The contenders of diffusers share one network.
    """
    placement = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    x = seeded_video(args).to(**placement)
    latent_size = ((args.frames - 1) // 4 + 1, args.height // 8, args.width // 8)
    z = seeded_input("latent", (1, LATENT_CHANNELS, *latent_size)).to(**placement)
    built = {}
    if OURS in contenders:
        vae = autoencoder(args.size).to(**placement)
        built[OURS] = {
            "encode": lambda: vae.encode(x, unregularized=True)[0],
            "decode": lambda: torch.cat(list(vae.decode_chunks(z)), dim=2),
            AT_ONCE: lambda: _decoded_at_once(vae, z),
        }
    if theirs := [name for name in contenders if name != OURS]:
        other = diffusers_autoencoder(args.size).to(**placement)
        frames = {DEFAULTS: other.num_sample_frames_batch_size, WHOLE: args.frames}

        def encode(name: str) -> torch.Tensor:
            other.num_sample_frames_batch_size = frames[name]
            return other.encode(x).latent_dist.parameters

        for name in theirs:
            built[name] = {"encode": partial(encode, name), "decode": lambda: other.decode(z).sample}
    return {name: {task: torch.no_grad()(run) for task, run in tasks.items()} for name, tasks in built.items()}


def _decoded_at_once(vae: VideoAutoencoderInferenceWrapper, z: torch.Tensor) -> torch.Tensor:
    vae.use_frames_at_once(vae.decoder.time_factor * z.shape[2])
    try:
        return torch.cat(list(vae.decode_chunks(z)), dim=2)
    finally:
        vae.use_frames_at_once(None)
