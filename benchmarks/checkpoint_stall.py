"""Measure how much a checkpoint with optimizer lengthens a run: the call and later steps.

    python benchmarks/checkpoint_stall.py [--model cogvideox_2b] [--layers 8] [--folder /scratch] [--write]
    python benchmarks/checkpoint_stall.py --device cuda --write

All weights are random, trained with AdamW, and saved as a run saves them. On a CPU the network keeps its width and has
eight layers, in float32, and the clip is small; the process takes 28 bytes per parameter, 14 GB for the width of the
2B, or 6 GB with `--layers 3`. On a GPU it has full size, in bfloat16 with ZeRO 2. The folder needs space for two
checkpoints.

The cost of a checkpoint is the time of the call, plus the excess time of the steps until the checkpoint is complete.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / folder) for folder in ("sat", "tests", "tests/sat", "benchmarks"))]

from harness import config_name, device_name, machine, tell  # noqa: E402

from cogvideox_sat.commands.flag_spellings import EitherSpellingParser  # noqa: E402
from cogvideox_sat.commands.startup import quiet_libraries  # noqa: E402

CPU_LAYERS = 8
CPU_CLIP = (1, 8, 12)  # latent frames, height, width


def main() -> None:
    parser = EitherSpellingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=config_name, default="cogvideox_2b", help="configuration in configs/")
    parser.add_argument("--layers", type=int, help=f"layers of the network; on a CPU {CPU_LAYERS} by default")
    parser.add_argument("--clip", type=int, nargs=3, metavar=("T", "H", "W"), help="size of the latents")
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="checkpoints of each kind")
    parser.add_argument("--folder", help="folder of the checkpoints; default: the folder for temporary files")
    parser.add_argument("--write", action="store_true", help="put the result into benchmarks/RESULTS.md")
    args = parser.parse_args()
    if args.repeats < 1 or (args.layers is not None and args.layers < 1):
        parser.error("--layers and --repeats must be at least 1")
    if args.folder is not None and not Path(args.folder).is_dir():
        parser.error(f"--folder: {args.folder} does not exist")
    quiet_libraries()
    from measuring.training_arguments import arguments, description

    command = ["--model", args.model, "--full", "--device", args.device]
    if args.device == "cpu":
        command += ["--layers", str(args.layers or CPU_LAYERS), "--clip", *map(str, args.clip or CPU_CLIP)]
    else:
        command += ["--dtype", "bfloat16", "--zero", "2", "--checkpointing"]
        command += ["--layers", str(args.layers)] if args.layers else []
        command += ["--clip", *map(str, args.clip)] if args.clip else []
    trained = arguments(None, command)
    from measuring.checkpoint_stalls import measure  # imports PyTorch

    text = f"{description(trained)}; {machine(trained.device)}\n\n{measure(trained, args.repeats, args.folder)}"
    tell(f"Checkpoints, {args.model}, {trained.device.type}, {trained.dtype}", text, args.write)


if __name__ == "__main__":
    main()
