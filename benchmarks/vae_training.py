"""A training step of the video autoencoder against diffusers' AutoencoderKLCogVideoX: same weights, same inputs.

    python benchmarks/vae_training.py [--device cuda] [--dtype bfloat16] [--size tiny] [--write]

A step encodes a clip, draws a latent with the same noise, decodes it, and goes back through mean absolute error and KL
divergence to the gradients of all weights. There is no optimizer, whose share would be the same. Ours encodes and
decodes the clip at once. diffusers is at its defaults, with which it cuts clips of more than 9 frames into slices; for
those it is also measured with its slices off. First ours and diffusers without slices compute one loss and its
gradients, which must agree in float32; then all take turns. Ours also runs with the activations of
`--checkpoint-levels` recomputed.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from harness import alternating_medians, markdown_table, peak_memories, peak_memory, write_results  # noqa: E402
from vae import (  # noqa: E402
    DEFAULTS,
    OURS,
    WHOLE,
    autoencoder,
    common_parser,
    diffusers_autoencoder,
    parse,
    seeded_video,
    setting,
)

from diffusers_vae import diffusers_name  # noqa: E402
from support import relative_error  # noqa: E402

KL_WEIGHT = 1e-6
LONGEST_UNCUT = 9  # frames that diffusers encodes and decodes at once by itself
AGREEMENT = 1e-4  # of loss and gradients in float32
SEED = 5


def main() -> None:
    args = arguments()
    if args.memory_of:
        step = build(args, args.memory_of)[1]
        print(json.dumps(peak_memory(lambda: [step() for _ in range(2)], args.device)))  # noqa: T201
        return

    recomputing = f"{OURS}, recomputing levels {', '.join(map(str, args.checkpoint_levels))}"
    theirs = [DEFAULTS, WHOLE] if args.frames > LONGEST_UNCUT else [DEFAULTS]
    contenders = {name: build(args, name) for name in (OURS, recomputing, *theirs)}
    losses = {name: step() for name, (_, step) in contenders.items()}
    alike = (OURS, theirs[-1])
    loss_error = relative_error(*(losses[name] for name in alike))
    gradient_error = relative_error(*(all_gradients(contenders[name][0]) for name in alike))
    if args.dtype == "float32" and max(loss_error, gradient_error) > AGREEMENT:
        raise SystemExit(f"the contenders differ: loss by {loss_error:.1e}, gradients by {gradient_error:.1e}")

    seconds = alternating_medians({name: step for name, (_, step) in contenders.items()}, args.repeats)
    del contenders
    memory = peak_memories(seconds, args.device)
    rows = [[name, each, f"{seconds[DEFAULTS] / each:.2f}×", memory[name]] for name, each in seconds.items()]
    text = (
        f"{setting(args)}\n\n{markdown_table(['', 's per step', 'times as fast', 'peak GiB'], rows)}\n\n"
        f"Relative difference of the losses: {loss_error:.1e}, of the gradients: {gradient_error:.1e}"
    )
    print(text)  # noqa: T201
    if args.write:
        write_results(f"Video autoencoder, training step, {args.size}, {args.device.type}, {args.dtype}", text)


def arguments() -> argparse.Namespace:
    parser = common_parser(__doc__)
    parser.add_argument("--checkpoint-levels", type=int, nargs="+", default=[0, 1], help="of ours, in a second run")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parse(parser)


def build(args: argparse.Namespace, contender: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The contender's network, and its training step as a function of no arguments that gives the loss."""
    placement = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    x = seeded_video(args).to(**placement)
    if contender in (DEFAULTS, WHOLE):
        network = diffusers_autoencoder(args.size).to(**placement).train()
        if contender == WHOLE:
            network.num_sample_frames_batch_size = network.num_latent_frames_batch_size = args.frames

        def forward() -> tuple[Tensor, Tensor]:
            posterior = network.encode(x).latent_dist
            z = posterior.sample(torch.Generator().manual_seed(SEED))
            return network.decode(z).sample, posterior.kl().sum()  # of one clip; theirs leaves the last dimension
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
    """Of all weights in one vector, in an order that both networks share."""
    named = sorted((diffusers_name(name), parameter) for name, parameter in network.named_parameters())
    return torch.cat([parameter.grad.flatten() for _, parameter in named])


if __name__ == "__main__":
    main()
