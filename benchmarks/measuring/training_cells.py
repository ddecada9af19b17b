"""Compare several training steps of ours and of diffusers in one table.

`training.py --cells` uses this table.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from harness import markdown_table

from measuring.training_arguments import CELL_LAYERS, CELLS

TIME, MEMORY = 1.02, 1.00  # largest ratios to diffusers


def cells(args: argparse.Namespace) -> str:
    """Return the table, and a line about the ratios, as Markdown."""
    rows, missed = [], []
    for name in args.cells or CELLS:
        found = measured(args, name)
        ratios = [found[what]["ours"] / found[what]["diffusers"] for what in ("seconds", "memory")]
        numbers = [f"{found[what][side]:.3g}" for what in ("seconds", "memory") for side in ("ours", "diffusers")]
        rows.append([name, *numbers, *(f"{ratio:.3f}" for ratio in ratios)])
        if ratios[0] > TIME or ratios[1] > MEMORY:
            missed.append(name)
    header = ["", "ours, s", "diffusers, s", "ours, GiB", "diffusers, GiB", "time ratio", "memory ratio"]
    sizes = [f"{name} is {CELLS[name][2]} x {'x'.join(map(str, CELLS[name][1]))} latents" for name in CELLS]
    judged = f"above {TIME} of the time or {MEMORY:.2f} of the memory: {', '.join(missed) or 'none'}"
    layers = args.own_layers or CELL_LAYERS
    return (
        f"{layers} layers, median of {args.repeats} steps in turns; {'; '.join(sizes)}\n\n"
        f"{markdown_table(header, rows)}\n\n{judged}"
    )


def measured(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the measurements of a separate process, see `training_step.Comparison`."""
    kind, clip, batch = CELLS[name]
    command = [sys.executable, sys.argv[0], "--model", args.model, f"--{kind}", "--row"]
    command += ["--layers", str(args.own_layers or CELL_LAYERS), "--batch", str(batch)]
    command += ["--clip", *map(str, args.own_clip or clip), "--repeats", str(args.repeats), "--zero", str(args.zero)]
    command += ["--device", str(args.device), "--dtype", args.dtype]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
