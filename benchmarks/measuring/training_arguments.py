"""The arguments of `training.py`: model, size and training; PyTorch is not imported."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from harness import ROOT, config_name, device_name

from cogvideox_sat.commands.flag_spellings import EitherSpellingParser
from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.latent_geometry import patch_sizes

CPU_LAYERS = 2
CPU_CLIP = (5, 30, 44)  # latent frames, height, width
CELL_LAYERS, CELL_REPEATS = 6, 7
CELLS = {  # trained weights, clip and batch: with 226 tokens of text, 514 and 2,008 tokens
    "lora-514": ("lora", (2, 24, 24), 2),
    "full-514": ("full", (2, 24, 24), 2),
    "lora-2000": ("lora", (9, 22, 36), 1),
    "full-2000": ("full", (9, 22, 36), 1),
}
DEFAULTS, EQUAL, OURS = "diffusers", "diffusers, equal settings", "ours"
RANK, LORA_ALPHA = 128, 1
LEARNING_RATE, BETAS, CLIPPING = 1e-4, (0.9, 0.95), 1.0


def arguments(description: str, command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments, with the named configuration and a clip that fits the device.

    Args:
        command_line: None: that of the process.
    """
    parser = EitherSpellingParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=config_name, default="cogvideox_2b", help="configuration in configs/, without LoRA"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--lora", dest="kind", action="store_const", const="lora", default="lora", help="the default")
    kind.add_argument("--full", dest="kind", action="store_const", const="full", help="train all weights")
    parser.add_argument("--layers", type=int, help="of the network")
    parser.add_argument("--clip", type=int, nargs=3, metavar=("T", "H", "W"), help="size of the latents")
    parser.add_argument("--batch", type=int, default=1, help="clips per step")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument(
        "--zero", type=int, choices=[0, 1, 2], default=0, help="stage of DeepSpeed, at least 1 in 16 bit"
    )
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, help="timed steps (default: 5, of cells 7)")
    parser.add_argument("--compile", action="store_true", help="ours, and diffusers with equal settings, compiled")
    parser.add_argument(
        "--equal",
        action="store_true",
        help="a row for diffusers with equal settings too, which takes more memory",
    )
    parser.add_argument("--overhead", action="store_true", help="measure the trainer instead")
    parser.add_argument(
        "--cells",
        nargs="*",
        choices=list(CELLS),
        metavar="CELL",
        help=f"one table of several steps instead, with {CELL_LAYERS} layers: all of {', '.join(CELLS)}, or the given",
    )
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="put the result into benchmarks/RESULTS.md")
    parser.add_argument("--memory-of", choices=[DEFAULTS, EQUAL, OURS], help=argparse.SUPPRESS)
    args = parser.parse_args(command_line)
    args.own_clip, args.own_layers = args.clip, args.layers
    args.repeats = args.repeats or (5 if args.cells is None else CELL_REPEATS)
    on_cpu = args.device == "cpu"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses its device on import, which comes later
    import torch

    args.device = torch.device(args.device)
    config = load_configs([ROOT / "configs" / f"{args.model}.yaml"])
    args.model_config = config["model"]
    params = args.params = args.model_config["network_config"]["params"]
    args.layers = params["num_layers"] = args.layers or (CPU_LAYERS if on_cpu else params["num_layers"])
    params["transformer_args"]["checkpoint_activations"] = args.checkpointing
    params["modules"].pop("lora_config", None)
    if args.kind == "lora":
        lora = {"r": RANK, "lora_alpha": LORA_ALPHA}
        params["modules"]["lora_config"] = {"target": "sat.model.finetune.lora2.LoraMixin", "params": lora}
    temporal = patch_sizes(params["patch_size"])[0]
    if not args.clip:
        height, width = config["args"]["sampling_image_size"]
        frames = config["args"]["sampling_num_frames"]
        # Networks that patch time get the first latent frame twice; a cache has it once.
        args.clip = CPU_CLIP if on_cpu else (frames - (temporal > 1), height // 8, width // 8)
    args.network_clip = (args.clip[0] + (temporal > 1), *args.clip[1:])
    if params["modules"]["pos_embed_config"]["params"].get("learnable_pos_embed"):
        # diffusers only supports learnt positions at their full size, so they are made for this clip.
        frames, height, width = args.clip
        params |= {"num_frames": 4 * (frames - 1) + 1, "latent_height": height, "latent_width": width}
    return args


def description(args: argparse.Namespace) -> str:
    parts = [
        f"{args.layers} layers, {'LoRA of rank ' + str(RANK) if args.kind == 'lora' else 'all weights'}",
        f"latents {'×'.join(map(str, args.clip))} (frames×height×width), batch {args.batch}, {args.dtype}",
        f"ZeRO {max(args.zero, int(args.dtype != 'float32'))}",
        *(["activation checkpointing"] if args.checkpointing else []),
        *(["ours and equal settings compiled"] if args.compile else []),
    ]
    return ", ".join(parts)


def deepspeed_config(args: argparse.Namespace, optimizer: str, **options: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_clipping": CLIPPING,
        "zero_optimization": {"stage": args.zero},
        "optimizer": {
            "type": optimizer,
            "params": {"lr": LEARNING_RATE, "betas": list(BETAS), "weight_decay": 0.0, **options},
        },
    }
