"""The arguments of the autoencoder's benchmarks, and their clips; PyTorch is not imported."""

import argparse

from harness import device_name, machine

from cogvideox_sat.commands.flag_spellings import EitherSpellingParser

NETWORKS = {"tiny": {"ch": 32, "num_res_blocks": 1}, "full": {"ch": 128, "num_res_blocks": 3}}
CLIPS = {  # frames, height, width
    ("tiny", "cpu"): (17, 64, 96),
    ("tiny", "cuda"): (17, 64, 96),
    ("full", "cpu"): (17, 96, 144),  # long enough for diffusers to encode it in two slices
    ("full", "cuda"): (49, 480, 720),
}
OURS, DEFAULTS, WHOLE = "ours", "diffusers", "diffusers, slices off"


def common_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments of every benchmark of the autoencoder."""
    parser = EitherSpellingParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--size", choices=list(NETWORKS), default="full", help="of the network")
    parser.add_argument("--frames", type=int, help="frames of the video, 8k+1, which diffusers needs")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--threads", type=int, help="threads on a CPU (default: PyTorch's)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the arguments, with a default clip that fits network and device."""
    args = parser.parse_args()
    default = CLIPS[args.size, args.device.partition(":")[0]]
    args.frames, args.height, args.width = (
        given or usual for given, usual in zip((args.frames, args.height, args.width), default, strict=True)
    )
    if (args.frames - 1) % 8:
        parser.error(
            f"--frames: {args.frames} does not fit: diffusers decodes an odd number of latent frames; give 8k+1"
        )
    import torch

    args.device = torch.device(args.device)
    args.threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(args.threads)
    return args


def setting(args: argparse.Namespace) -> str:
    """Return one line about the measurement and the machine."""
    clip = f"{args.frames} frames of {args.height}x{args.width}"
    return f"{args.size} network, {clip}, {args.dtype}; {machine(args.device)}"
