"""Encode and decode of the video autoencoder against diffusers' AutoencoderKLCogVideoX: same weights, same inputs.

    python benchmarks/vae.py [--device cuda] [--dtype bfloat16] [--size tiny] [--write]

Ours encodes the clip at once, as the original does. diffusers encodes it in slices of eight frames, unless that is
switched off: both are measured. Both sides decode in chunks of two latent frames. Ratios are to diffusers at its
defaults; the difference of slices is not an error of either side, since their norms see less of the clip.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "sat"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from harness import (  # noqa: E402
    alternating_medians,
    machine,
    markdown_table,
    peak_memories,
    peak_memory,
    write_results,
)

from cogvideox_sat.commands.flag_spellings import EitherSpellingParser  # noqa: E402
from diffusers_vae import as_diffusers  # noqa: E402
from seeded import seed_module_, seeded_input  # noqa: E402
from support import relative_error  # noqa: E402
from vae_modules.autoencoder import VideoAutoencoderInferenceWrapper  # noqa: E402

NETWORKS = {"tiny": {"ch": 32, "num_res_blocks": 1}, "full": {"ch": 128, "num_res_blocks": 3}}
CLIPS = {  # frames, height, width
    ("tiny", "cpu"): (17, 64, 96),
    ("tiny", "cuda"): (17, 64, 96),
    ("full", "cpu"): (17, 96, 144),  # long enough for diffusers to encode it in two slices
    ("full", "cuda"): (49, 480, 720),
}
LATENT_CHANNELS = 16
OURS, DEFAULTS, WHOLE = "ours", "diffusers", "diffusers, slices off"
CONTENDERS = {"encode": (DEFAULTS, WHOLE, OURS), "decode": (DEFAULTS, OURS)}


def main() -> None:
    args = arguments()
    if args.memory_of:
        task, contender = args.memory_of
        print(json.dumps(peak_memory(build(args, contender)[contender][task], args.device)))  # noqa: T201
        return

    built = build(args, DEFAULTS, WHOLE, OURS)
    rows = []
    for task, names in CONTENDERS.items():
        contenders = {name: built[name][task] for name in names}
        seconds = alternating_medians(contenders, args.repeats)
        outputs = {name: run() for name, run in contenders.items()}
        memory = peak_memories(names, args.device, task)
        for name in names:
            ratios = [f"{each[name] / each[DEFAULTS]:.3f}" for each in (seconds, memory)]
            difference = "" if name == OURS else f"{relative_error(outputs[OURS], outputs[name]):.1e}"
            rows.append([f"{task}: {name}", seconds[name], f"{memory[name]:.2f}", *ratios, difference])
    header = ["", "s", "peak GiB", "time ratio", "memory ratio", "ours differs by"]
    text = f"{setting(args)}\n\n{markdown_table(header, rows)}"
    print(text)  # noqa: T201
    if args.write:
        write_results(f"Video autoencoder, {args.size}, {args.device.type}, {args.dtype}", text)


def arguments() -> argparse.Namespace:
    parser = common_parser(__doc__)
    parser.add_argument("--memory-of", nargs=2, metavar=("TASK", "CONTENDER"), help=argparse.SUPPRESS)
    return parse(parser)


def common_parser(description: str) -> argparse.ArgumentParser:
    """The arguments of every benchmark of the autoencoder."""
    parser = EitherSpellingParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--size", choices=list(NETWORKS), default="full", help="of the network")
    parser.add_argument("--frames", type=int, help="of the video, 8k+1: diffusers decodes no others")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with a clip that suits network and device where none is given."""
    args = parser.parse_args()
    default = CLIPS[args.size, args.device.type]
    args.frames, args.height, args.width = (
        given or usual for given, usual in zip((args.frames, args.height, args.width), default, strict=True)
    )
    if (args.frames - 1) % 8:
        parser.error(
            f"--frames: {args.frames} does not fit: diffusers decodes an odd number of latent frames; give 8k+1"
        )
    torch.set_num_threads(args.threads)
    return args


def setting(args: argparse.Namespace) -> str:
    """One line that says what was measured, and where."""
    clip = f"{args.frames} frames of {args.height}x{args.width}"
    return f"{args.size} network, {clip}, {args.dtype}; {machine(args.device)}"


def autoencoder(size: str, **coder: object) -> VideoAutoencoderInferenceWrapper:
    """Ours, with the seeded weights of every benchmark; `coder` are further options of encoder and decoder."""
    params = {"z_channels": LATENT_CHANNELS, **NETWORKS[size], **coder}
    vae = VideoAutoencoderInferenceWrapper(
        encoder_config={"target": "vae_modules.cp_enc_dec.ContextParallelEncoder3D", "params": params},
        decoder_config={"target": "vae_modules.cp_enc_dec.ContextParallelDecoder3D", "params": params},
        regularizer_config={"target": "vae_modules.regularizers.DiagonalGaussianRegularizer"},
    )
    return seed_module_(vae)


def diffusers_autoencoder(size: str) -> torch.nn.Module:
    """Return theirs with the same weights, at its defaults."""
    network = NETWORKS[size]
    ours = autoencoder(size)
    return as_diffusers(ours, network["ch"], network["num_res_blocks"], LATENT_CHANNELS, whole_clip=False)


def seeded_video(args: argparse.Namespace) -> torch.Tensor:
    return seeded_input("video", (1, 3, args.frames, args.height, args.width)).clamp(-1, 1)


def build(args: argparse.Namespace, *contenders: str) -> dict[str, dict[str, Callable[[], torch.Tensor]]]:
    """Return the two tasks of each contender, as functions of no arguments. Those of diffusers share one network."""
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


if __name__ == "__main__":
    main()
