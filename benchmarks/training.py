"""One training step on cached latents against the same step written with diffusers and peft: same weights and inputs.

    python benchmarks/training.py [--model cogvideox_5b] [--full] [--device cuda] [--dtype bfloat16] [--write]
    python benchmarks/training.py --equal [--compile] [--write]
    python benchmarks/training.py --cells [--write]
    python benchmarks/training.py --overhead [--write]

A step is forward, loss of v, backward, clipping and AdamW, on LoRA of the attention projections or on all weights. Both
sides hold the network in `--dtype`, and float32 weights beside it of what is trained. Ours draws latents, timestep and
noise within the step, as it does in training; the other side is given them. First both compute one loss and its
gradients, which must agree; then they take turns, on the same batch.

With `--equal` diffusers is measured with the settings of ours as well: its attention kernel, one product for queries,
keys and values where all weights are trained, and with `--compile` layers through torch.compile.

On a CPU the network keeps its width but loses most of its layers, and the clip is small; on a GPU both are full size,
with random weights. `--cells` makes one table of four steps, with LoRA and on all weights, of few tokens and of many;
each in a process of its own, which needs up to 14 GB. `--overhead` runs the trainer itself, from a cache of generated
clips, and tells how much of a step passes outside of the network's forward and backward pass and the optimizer.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / folder) for folder in ("sat", "tests", "tests/sat", "benchmarks"))]

from harness import machine, peak_memory, tell  # noqa: E402
from measuring.training_arguments import arguments, description  # noqa: E402

from cogvideox_sat.commands.startup import quiet_libraries  # noqa: E402


def main() -> None:
    args = arguments(__doc__)
    quiet_libraries()
    # Imports PyTorch: seconds, spent only once the request is known to make sense
    if args.cells is not None:
        from measuring.training_cells import cells

        text = f"{cells(args)}\n\n{machine(args.device)}"
        tell(f"Training steps, {args.model}, {args.device.type}, {args.dtype}", text, args.write)
        return
    if args.row and not args.memory_of:
        from measuring.training_step import measure

        print(json.dumps(measure(args)._asdict()))  # noqa: T201
        return
    if args.overhead:
        from measuring.training_overhead import overhead

        title, text = "Time outside of the network and the optimizer", overhead(args)
    elif args.memory_of:
        from measuring.training_step import build

        contender = build(args)[args.memory_of]
        print(json.dumps(peak_memory(lambda: [contender.step() for _ in range(2)], args.device)))  # noqa: T201
        return
    else:
        from measuring.training_step import compare

        title, text = "Training step", compare(args)
    text = f"{description(args)}; {machine(args.device)}\n\n{text}"
    checkpointing, compiled = ", checkpointing" * args.checkpointing, ", compiled" * args.compile
    section = f"{title}, {args.model}, {args.kind}, {args.device.type}, {args.dtype}{checkpointing}{compiled}"
    tell(section, text, args.write)


if __name__ == "__main__":
    main()
