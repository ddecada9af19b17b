"""Compare encode and decode of the video autoencoder with AutoencoderKLCogVideoX.

    python benchmarks/vae.py [--device cuda] [--dtype bfloat16] [--size tiny] [--write]
    python benchmarks/vae.py --count --dtype bfloat16 --frames 49 --height 480 --width 720 [--write]

Both have the same weights and inputs. The second command counts, without computing anything, the bytes that ours reads
and writes outside of convolutions (a pass that adds a bias included), and its memory on a GPU: as it runs by default,
with all chunks decoded at once, and with fewer frames.

Ours encodes the clip at once, as the original does. diffusers encodes it in slices of eight frames, unless slices are
off: both are measured. Both sides decode in chunks of two latent frames. Ratios are to diffusers at its defaults; the
difference of slices is not an error of either side, since norms of slices see less of the clip.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "sat"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from harness import alternating_medians, counted_with, markdown_table, peak_memories, peak_memory, tell  # noqa: E402
from measuring.vae_arguments import DEFAULTS, OURS, WHOLE, common_parser, parse, setting  # noqa: E402

CONTENDERS = {"encode": (DEFAULTS, WHOLE, OURS), "decode": (DEFAULTS, OURS)}


def main() -> None:
    args = arguments()
    # Imported here, since PyTorch takes seconds to load: only after the arguments are checked
    from measuring.autoencoders import build

    from support import relative_error

    if args.count:
        size = f"{args.frames} frames of {args.height}x{args.width}"
        tell(f"Video autoencoder, {args.size}, counted: {size}, {args.dtype}", counted(args), args.write)
        return
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
    tell(f"Video autoencoder, {args.size}, {args.device.type}, {args.dtype}", text, args.write)


KINDS = {  # kinds of operations besides convolutions, with their names
    "norms applied": ("modulated_silu", "product_silu"),
    "norms' statistics": ("channel_sums",),
    "sums with shortcuts": ("add_and_sum", "add_product_and_sum"),
    "causal frames and other copies": ("clone", "copy_", "cat", "pad"),
    "sums, halved or doubled": ("halved_sum", "doubled_sum"),
    "biases": ("bias",),
}


def counted(args: argparse.Namespace) -> str:
    """Return the tables of counts on tensors without content."""
    import torch
    from measuring.autoencoders import LATENT_CHANNELS, build_without_content

    from memory_traffic import traffic_of
    from sgm.models.video_coder_memory import peak_bytes

    size = args.frames, args.height, args.width
    dtype = getattr(torch, args.dtype)
    vae = build_without_content(args.size, dtype)
    weights = sum(parameter.nbytes for parameter in vae.parameters())
    latent_size = (args.frames - 1) // 4 + 1, args.height // 8, args.width // 8
    clip, latent = (
        torch.empty((1, channels, *each), dtype=dtype, device="meta")
        for channels, each in ((3, size), (LATENT_CHANNELS, latent_size))
    )
    whole = args.frames - 1
    tasks = [
        ("encode", None, lambda: vae.encode(clip, unregularized=True)),
        ("decode", None, lambda: list(vae.decode_chunks(latent))),
        ("decode", whole, lambda: list(vae.decode_chunks(latent))),
    ]
    rows, parts = [], []
    for task, at_once, run in tasks:
        peak = peak_bytes(vae, task, *size, frames_at_once=at_once) + weights
        vae.use_frames_at_once(at_once)
        traffic = traffic_of(run)
        vae.use_frames_at_once(None)
        if at_once is not None:
            task = f"{task} all chunks at once, --vae_frames_at_once {at_once}"
        rows.append([task, f"{traffic.total / 1e9:.1f}", f"{peak / 2**30:.2f}"])
        of_kind = [
            sum(traffic.bytes[name] for name in traffic.bytes if any(map(name.count, kind))) for kind in KINDS.values()
        ]
        parts.append([f"{task}, by kind", *(f"{size / 1e9:.1f}" for size in of_kind)])
    for task, at_once in itertools.product(("encode", "decode"), (8, 4)):
        peak = peak_bytes(vae, task, *size, frames_at_once=at_once) + weights
        rows.append([f"{task}, --vae_frames_at_once {at_once}", "", f"{peak / 2**30:.2f}"])
    table = markdown_table(["", "GB beside convolutions", "GiB"], rows)
    return f"{counted_with()}\n\n{table}\n\nGB by kind:\n\n{markdown_table(['', *KINDS], parts)}"


def arguments() -> argparse.Namespace:
    parser = common_parser(__doc__)
    parser.add_argument("--count", action="store_true", help="count bytes, and measure nothing")
    parser.add_argument("--memory-of", nargs=2, metavar=("TASK", "CONTENDER"), help=argparse.SUPPRESS)
    return parse(parser)


if __name__ == "__main__":
    main()
