"""Measure the host memory of loading, for every form of weights, at released sizes.

    python benchmarks/loading.py [--folder /scratch] [--write]
    python benchmarks/loading.py --model tiny/cogvideox_tiny --t5-layers 1 --t5-width 64     small, to test the
        benchmark

Files of random numbers are made, one form after another, and its own process reads them to the last byte, as the
commands do. The process's anonymous memory is sampled: mapped parts of files do not count, copies do. PyTorch and other
imports take half a GiB of it. On a CPU a dtype other than that of the file needs a copy of the weights; on a GPU
weights go there one at a time. Tensors of diffusers that are combined into one are copied in any case. Linux only; the
text encoder takes 9 GiB of the disk, the pieces of ZeRO 13.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "sat"), str(ROOT / "benchmarks")]

from harness import config_name, machine, markdown_table, tell  # noqa: E402
from measuring.process_memory import watched  # noqa: E402

from cogvideox_sat.commands.flag_spellings import EitherSpellingParser  # noqa: E402
from cogvideox_sat.commands.startup import quiet_libraries  # noqa: E402

T5_LAYERS, T5_WIDTH, CAST_LAYERS = 24, 4096, 6  # of google/t5-v1_1-xxl; layers that are read in another dtype
FORMS = {
    "network: .pt": "pt",
    "network: .pt, as bfloat16": "pt bfloat16",
    "network: safetensors": "safetensors",
    "network: safetensors, several files": "sharded",
    "network: folder of diffusers": "diffusers",
    "network: pieces of ZeRO": "zero",
    "network: LoRA merged": "lora",
    "text encoder: bfloat16": "t5",
    f"text encoder, {CAST_LAYERS} layers: as float32": "t5 float32",
}


def main() -> None:
    parser = EitherSpellingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=config_name, default="cogvideox_2b", help="configuration in configs/")
    parser.add_argument("--t5-layers", type=int, default=T5_LAYERS, help="layers of the text encoder")
    parser.add_argument("--t5-width", type=int, default=T5_WIDTH, help="width of the text encoder, a multiple of 64")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS.values()), default=list(FORMS.values()))
    parser.add_argument("--folder", type=Path, help="folder for temporary files (default: the system's)")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    parser.add_argument("--read", nargs=2, metavar=("FORM", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.t5_layers < 1 or args.t5_width < 64 or args.t5_width % 64:
        parser.error("--t5-layers must be at least 1, and --t5-width a multiple of 64")
    if args.folder and not args.folder.is_dir():
        parser.error(f"--folder: {args.folder} does not exist; name a folder")
    quiet_libraries()
    if args.read:
        from measuring.loading_forms import read

        read(args, *args.read)
        return
    import torch
    from measuring.loading_forms import largest_file, make

    rows = []
    for title, form in FORMS.items():
        if form not in args.forms:
            continue
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            if form.startswith("t5 "):
                args.t5_layers = min(args.t5_layers, CAST_LAYERS)
            held = make(args, form, Path(folder))
            usage = watched([sys.executable, *sys.argv, "--read", form, folder])
            size = largest_file(Path(folder))
        rows.append([title, size, held, usage.anonymous, f"{usage.anonymous / max(size, held):.2f}", usage.seconds])
    header = ["", "largest file GiB", "weights as loaded GiB", "anonymous GiB", "of the larger of both", "s"]
    text = f"{args.model} and T5-XXL, random; {machine(torch.device('cpu'))}\n\n{markdown_table(header, rows)}"
    tell(f"Host memory of loading, {args.model}", text, args.write)


if __name__ == "__main__":
    main()
