"""Compare one training step on cached latents with the same step by diffusers and peft.

    python benchmarks/training.py [--model cogvideox_5b] [--full] [--device cuda] [--dtype bfloat16] [--write]
    python benchmarks/training.py --equal [--compile] [--write]
    python benchmarks/training.py --cells [--write]
    python benchmarks/training.py --overhead [--write]

Both have the same weights and inputs. A step is forward pass, loss of v, backward pass, clipping and AdamW, on LoRA of
the attention projections or on all weights. Both sides have the network in `--dtype`, and float32 copies of trained
weights. Our side draws latents, timestep and noise within the step, as in training; the other side gets them. First
both compute one loss and its gradients, which must agree; then they take turns, on the same batch.

With `--equal` diffusers is also measured with our settings: our attention kernel, one product for queries, keys and
values if all weights are trained, and with `--compile` layers through torch.compile.

On a CPU the network keeps its width but has few layers, and the clip is small; on a GPU both have full size, with
random weights. `--cells` makes one table of four steps, with LoRA and on all weights, with few tokens and with many,
each in its own process, which needs up to 14 GB. `--overhead` runs the trainer itself, from a cache of generated clips,
and measures the share of a step outside of the network's forward and backward pass and the optimizer.
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
    # Imported here, since PyTorch takes seconds to load: only after the arguments are checked
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
