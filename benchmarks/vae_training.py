"""Compare a training step of the video autoencoder with AutoencoderKLCogVideoX.

    python benchmarks/vae_training.py [--device cuda] [--dtype bfloat16] [--size tiny] [--write]

Both have the same weights and inputs. A step encodes a clip, draws a latent with the same noise, decodes it, and
computes the gradients of all weights for mean absolute error and KL divergence. A step has no optimizer, whose share
would be the same. Ours encodes and decodes the clip at once. diffusers, at its defaults, cuts clips of more than 9
frames into slices; for these it is also measured with slices off. First ours and diffusers without slices compute one
loss and its gradients, which must agree in float32; then all take turns. Ours also runs with the activations of
`--checkpoint-levels` recomputed.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "sat"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from harness import alternating_medians, markdown_table, peak_memories, peak_memory, tell  # noqa: E402
from measuring.vae_arguments import DEFAULTS, OURS, WHOLE, common_parser, parse, setting  # noqa: E402

LONGEST_UNCUT = 9  # frames that diffusers encodes and decodes at once by default
AGREEMENT = 1e-4  # largest relative difference of loss and gradients in float32


def main() -> None:
    args = arguments()
    # Imported here, since PyTorch takes seconds to load: only after the arguments are checked
    from measuring.vae_steps import all_gradients, build

    from support import relative_error

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
    tell(f"Video autoencoder, training step, {args.size}, {args.device.type}, {args.dtype}", text, args.write)


def arguments() -> argparse.Namespace:
    parser = common_parser(__doc__)
    parser.add_argument("--checkpoint-levels", type=int, nargs="+", default=[0, 1], help="recomputed in a second run")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parse(parser)


if __name__ == "__main__":
    main()
