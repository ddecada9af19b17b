"""Compare one evaluation of the network with diffusers' CogVideoXTransformer3DModel.

    python benchmarks/network.py [--model cogvideox_5b] [--device cuda] [--dtype bfloat16] [--compile] [--write]

Both have the same weights and inputs. diffusers is measured at its defaults, to which ratios refer, and with our
settings: our attention kernel, one product for queries, keys and values, and with `--compile` also layers through
torch.compile.

The batch of two is one step of sampling with classifier-free guidance. On a CPU the network keeps its width but has few
layers, and the clip is small; on a GPU both have full size, with random weights.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / folder) for folder in ("sat", "tests", "tests/sat", "benchmarks"))]

from harness import (  # noqa: E402
    alternating_medians,
    config_name,
    device_name,
    layer_flops,
    machine,
    markdown_table,
    peak_memories,
    peak_memory,
    speeds,
    tell,
)

from cogvideox_sat.commands.flag_spellings import EitherSpellingParser  # noqa: E402
from cogvideox_sat.configuration.files import load_configs  # noqa: E402
from cogvideox_sat.latent_geometry import patch_sizes  # noqa: E402

if TYPE_CHECKING:
    import torch

BATCH = 2
CPU_LAYERS = 2
CPU_CLIP = (5, 30, 44)  # latent frames, height, width; an even number of frames for 1.5
DEFAULTS, EQUAL, OURS = "diffusers", "diffusers, equal settings", "ours"


def main() -> None:
    args = arguments()
    from support import relative_error  # imports PyTorch

    if args.memory_of:
        print(json.dumps(peak_memory(build(args)[args.memory_of], args.device)))  # noqa: T201
        return
    contenders = build(args)
    seconds = alternating_medians(contenders, args.repeats)
    outputs = {name: run() for name, run in contenders.items()}
    errors = [relative_error(outputs[name], outputs[OURS]) for name in (DEFAULTS, EQUAL)]
    del outputs
    del contenders
    memory = peak_memories(seconds, args.device)
    flops = floating_point_operations(args)
    rows = [[name, *cells] for name, cells in speeds(seconds, memory, flops).items()]
    header = ["", "s per step", "TFLOP/s", "peak GiB", "time ratio"]
    clip = "×".join(map(str, args.clip))
    text = (
        f"{args.layers} layers, latents {clip} (frames×height×width), batch {BATCH}, {args.dtype}"
        f"{', ours and equal settings compiled' if args.compile else ''}; {machine(args.device)}\n\n"
        f"{markdown_table(header, rows)}\n\n"
        f"Relative difference of ours from diffusers: {errors[0]:.1e}, with equal settings {errors[1]:.1e}"
    )
    compiled = ", compiled" if args.compile else ""
    tell(f"Network, {args.model}, {args.device.type}, {args.dtype}{compiled}", text, args.write)


def arguments() -> argparse.Namespace:
    parser = EitherSpellingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=config_name, default="cogvideox_5b", help="configuration in configs/")
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--layers", type=int, help="of the network")
    parser.add_argument("--clip", type=int, nargs=3, metavar=("T", "H", "W"), help="size of the latents")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compile", action="store_true", help="ours, and diffusers with equal settings, with torch.compile"
    )
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    parser.add_argument("--memory-of", choices=[DEFAULTS, EQUAL, OURS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    args.device = torch.device(args.device)
    config = load_configs([ROOT / "configs" / f"{args.model}.yaml"])
    args.network_config = config["model"]["network_config"]
    params = args.params = args.network_config["params"]
    on_cpu = args.device.type == "cpu"
    args.layers = args.layers or (CPU_LAYERS if on_cpu else params["num_layers"])
    params["num_layers"] = args.layers
    if not args.clip:
        height, width = config["args"]["sampling_image_size"]
        full = (config["args"]["sampling_num_frames"], height // 8, width // 8)
        args.clip = CPU_CLIP if on_cpu else full
        args.clip = (args.clip[0] + args.clip[0] % patch_sizes(params["patch_size"])[0], *args.clip[1:])
    return args


def build(args: argparse.Namespace) -> dict[str, Callable[[], "torch.Tensor"]]:
    """Return the contenders' forward passes.

    With `--memory-of` only the weights of that contender are made.
    """
    import torch
    from measuring.equal_settings import attention_of, compile_layers, fuse_projections

    from cogvideox_sat.configuration.meta_device import instantiate_on_meta
    from cogvideox_sat.weights.loading import initialise_missing
    from diffusers_network import build_diffusers_network, diffusers_network, diffusers_rotary
    from sgm.compilation import compile_network

    params, dtype = args.network_config["params"], getattr(torch, args.dtype)
    torch.manual_seed(0)
    network = instantiate_on_meta(args.network_config).to(dtype)
    frames, height, width = args.clip
    text_length = params["modules"]["pos_embed_config"]["params"]["text_length"]
    text_width = params["modules"]["patch_embed_config"]["params"]["text_hidden_size"]
    x = torch.randn(BATCH, frames, params["in_channels"], height, width, device=args.device, dtype=dtype)
    context = torch.randn(BATCH, text_length, text_width, device=args.device, dtype=dtype)
    timesteps = torch.full((BATCH,), 500, device=args.device)
    ofs = torch.full((BATCH,), 2.0, device=args.device) if params.get("ofs_embed_dim") else None
    rotary = diffusers_rotary(params, network.patch_grid(x))
    rotary = rotary and tuple(table.to(args.device) for table in rotary)

    attention = attention_of(args, gradients=False)

    made: dict[str, torch.nn.Module] = {}
    if args.memory_of in (None, OURS):
        initialise_missing(network, args.device, {})
        network.to(args.device).eval()
        network.use_attention(attention)
    for name in (DEFAULTS, EQUAL):
        if args.memory_of == name:
            made[name] = build_diffusers_network(params, args.device, dtype)
        elif args.memory_of is None:
            made[name] = diffusers_network(network, params)
    if EQUAL in made:
        fuse_projections(made[EQUAL])
        if args.compile:
            compile_layers(made[EQUAL])
    if args.compile and args.memory_of in (None, OURS):
        compile_network(network)

    @torch.no_grad()
    def diffusers() -> torch.Tensor:
        return made[DEFAULTS](x, context, timesteps, ofs=ofs, image_rotary_emb=rotary, return_dict=False)[0]

    @torch.no_grad()
    def with_equal_settings() -> torch.Tensor:
        with attention.applied():
            return made[EQUAL](x, context, timesteps, ofs=ofs, image_rotary_emb=rotary, return_dict=False)[0]

    @torch.no_grad()
    def ours() -> torch.Tensor:
        return network(x, timesteps, context, ofs=ofs)

    return {DEFAULTS: diffusers, EQUAL: with_equal_settings, OURS: ours}


def floating_point_operations(args: argparse.Namespace) -> float:
    """Return the operations of the matrix products of all layers."""
    params = args.network_config["params"]
    o, p, q = patch_sizes(params["patch_size"])
    frames, height, width = args.clip
    text = params["modules"]["pos_embed_config"]["params"]["text_length"]
    n, d = text + frames * height * width // (o * p * q), params["hidden_size"]
    return BATCH * args.layers * sum(layer_flops(n, d))


if __name__ == "__main__":
    main()
