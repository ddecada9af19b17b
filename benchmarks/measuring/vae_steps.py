"""The training steps of `vae_training.py`."""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusers_vae import diffusers_name
from measuring.autoencoders import autoencoder, diffusers_autoencoder, seeded_video
from measuring.vae_arguments import DEFAULTS, OURS, WHOLE

KL_WEIGHT = 1e-6
SEED = 5


def build(args: argparse.Namespace, contender: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return the contender's network, and its training step, which returns the loss."""
    placement = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    x = seeded_video(args).to(**placement)
    if contender in (DEFAULTS, WHOLE):
        network = diffusers_autoencoder(args.size).to(**placement).train()
        if contender == WHOLE:
            network.num_sample_frames_batch_size = network.num_latent_frames_batch_size = args.frames

        def forward() -> tuple[Tensor, Tensor]:
            posterior = network.encode(x).latent_dist
            z = posterior.sample(torch.Generator().manual_seed(SEED))
            return network.decode(z).sample, posterior.kl().sum()  # of one clip; diffusers keeps the last dimension
    else:
        levels = () if contender == OURS else args.checkpoint_levels
        network = autoencoder(args.size, checkpoint_levels=levels).to(**placement).train()

        def forward() -> tuple[Tensor, Tensor]:
            torch.manual_seed(SEED)
            z, log = network.encode(x, return_reg_log=True)
            return network.decode_at_once(z), log["kl_loss"]

    def step() -> Tensor:
        network.zero_grad()
        reconstruction, kl = forward()
        loss = (reconstruction - x).abs().mean() + KL_WEIGHT * kl
        loss.backward()
        return loss.detach()

    return network, step


def all_gradients(network: nn.Module) -> Tensor:
    """Return the gradients of all weights in one vector, in the same order for both networks."""
    named = sorted((diffusers_name(name), parameter) for name, parameter in network.named_parameters())
    return torch.cat([parameter.grad.flatten() for _, parameter in named])
