"""Measure time and memory of the tools for weights, at a released model's size.

    python benchmarks/conversion.py [--family 5b] [--max-shard-size 1] [--folder /scratch] [--write]
    python benchmarks/conversion.py --config tests/configs/2b.yaml            a small model, to test the benchmark

Network and VAE are converted to diffusers and back; an adapter is merged, exported and imported. All have the tensors
of the released model, with random values. Each command runs in its own process, whose memory is sampled: its resident
memory includes the mapped parts of the files it reads, its anonymous memory does not. PyTorch alone takes half a GiB.
The result of the way back must equal the input bit by bit. Linux only; takes four times the model's size on the disk.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "sat"), str(ROOT / "benchmarks")]

from harness import machine, markdown_table, tell  # noqa: E402
from measuring.process_memory import Usage, watched  # noqa: E402

from cogvideox_sat.commands.flag_spellings import EitherSpellingParser  # noqa: E402
from cogvideox_sat.commands.input_paths import find_input, not_found  # noqa: E402
from cogvideox_sat.configuration.files import load_configs  # noqa: E402
from cogvideox_sat.conversion.lora_names import PROJECTIONS, MatrixKey, Projection, base_weight  # noqa: E402
from cogvideox_sat.conversion.released_models import CONFIGS, TITLES  # noqa: E402
from cogvideox_sat.files.shipped import CONFIGS as CONFIG_FOLDER  # noqa: E402

if TYPE_CHECKING:
    import torch
    from torch import Tensor

RANK = 128  # of the adapter


# The task, its command, and the folder of the largest file that it reads or writes.
TASKS = (
    (
        "to diffusers",
        "convert_weight_sat2hf.py --transformer_ckpt_path network --vae_ckpt_path 3d-vae.pt --output_path out "
        "--max_shard_size {}",
        "out",
    ),
    ("back", "convert_weight_hf2sat.py --hf_path out --output_path back", "out"),
    ("merge LoRA", "merge_lora.py --load network --lora lora --output merged", "merged"),
    ("export LoRA", "export_sat_lora_weight.py --sat_pt_path lora --lora_save_directory exported", "exported"),
    ("import LoRA", "import_hf_lora.py --lora_path exported --output imported", "exported"),
)


def main() -> None:
    args = arguments()
    from cogvideox_sat.conversion.safetensors_writing import check_equal  # imports PyTorch
    from cogvideox_sat.conversion.stored_weights import open_weights

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_checkpoints(args, folder)
        rows = []
        for task, command, files in TASKS:
            use = run(args, folder, command.format(args.max_shard_size))
            size = largest(folder / files)
            rows.append([task, use.seconds, use.busy, size, use.resident, use.resident / size, use.anonymous])
        for ours, theirs in (
            ("network", "back/transformer"),
            ("3d-vae.pt", "back/vae/3d-vae.pt"),
            ("lora", "imported"),
        ):
            went, came = (open_weights(file_of(folder / name)) for name in (ours, theirs))
            check_equal(came, went, folder / theirs)
        text = report(args, rows)
    tell(
        f"Conversion, {args.config or CONFIGS[args.family]}, files of at most {args.max_shard_size:g} GB",
        text,
        args.write,
    )


def arguments() -> argparse.Namespace:
    parser = EitherSpellingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(CONFIGS), default="2b")
    parser.add_argument("--config", type=Path, help="configuration of another model, with 16-bit weights")
    parser.add_argument("--max-shard-size", type=float, default=5, metavar="GB", help="largest file for diffusers")
    parser.add_argument("--folder", type=Path, help="folder for temporary files (default: the system's)")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    args = parser.parse_args()
    if args.config and find_input(args.config, "--config") is None:
        parser.error(not_found("--config", args.config))
    if args.folder and not args.folder.is_dir():
        parser.error(f"--folder: {args.folder} does not exist; name a folder")
    import torch

    args.threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(args.threads)
    return args


def make_checkpoints(args: argparse.Namespace, folder: Path) -> None:
    """Write random checkpoints of the network, the VAE and an adapter.

    The network has the released model's dtype, with computed position tables; the VAE is float32.
    """
    import torch

    from cogvideox_sat.configuration.meta_device import instantiate_on_meta
    from cogvideox_sat.conversion.checkpoint_folders import write_checkpoint, write_tensors

    config = load_configs([args.config or CONFIG_FOLDER / f"{CONFIGS[args.family]}.yaml"])
    dtype = torch.float16 if config["args"].get("fp16") else torch.bfloat16
    network = instantiate_on_meta(config["model"]["network_config"]).to(dtype).state_dict()
    write_checkpoint(folder / "network", network, lambda name: random_like(network[name]))
    adapter = adapter_like(network, dtype)
    write_checkpoint(folder / "lora", adapter, lambda name: random_like(adapter[name]))
    coder = config["model"]["first_stage_config"]
    coder["params"]["ckpt_path"] = None
    vae = instantiate_on_meta(coder).state_dict()
    write_tensors(folder / "3d-vae.pt", vae, lambda name: random_like(vae[name]), key="state_dict", prefix="")


def adapter_like(network: Mapping[str, "Tensor"], dtype: "torch.dtype") -> dict[str, "Tensor"]:
    """Return the matrices of an adapter on a network, without values."""
    import torch

    layers = itertools.takewhile(lambda layer: base_weight(layer, "dense") in network, itertools.count())
    width = network[base_weight(0, "dense")].shape[1]
    matrices = {}
    for layer in layers:
        for part in PROJECTIONS:
            for matrix, shape in (("A", (RANK, width)), ("B", (width, RANK))):
                key = MatrixKey(Projection(layer, part), matrix)
                matrices[key.sat_name] = torch.empty(shape, dtype=dtype, device="meta")
    return matrices


def random_like(tensor: "Tensor") -> "Tensor":
    """Return random values with the shape and dtype of a tensor on the meta device."""
    import torch

    return torch.empty(tensor.shape, dtype=tensor.dtype).normal_(std=0.02) if tensor.is_meta else tensor


def run(args: argparse.Namespace, folder: Path, line: str) -> Usage:
    """Run a tool in a folder, and sample its memory until it ends."""
    tool, *arguments = line.split()
    command = [sys.executable, str(ROOT / "tools" / tool), *arguments]
    return watched(command, folder, {"OMP_NUM_THREADS": str(args.threads)})


def file_of(path: Path) -> Path:
    from cogvideox_sat.weights.checkpoint_files import checkpoint_file

    return checkpoint_file(path) if path.is_dir() else path


def largest(folder: Path) -> float:
    """Return the size of the largest file in a folder, in GiB."""
    return max(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**30


def report(args: argparse.Namespace, rows: list[list[object]]) -> str:
    import torch

    header = ["", "s", "on a processor, s", "largest file GiB", "resident GiB", "of the largest file", "anonymous GiB"]
    return (
        f"{args.config or TITLES[args.family]}, VAE and LoRA of rank {RANK}, random; files for diffusers of at most "
        f"{args.max_shard_size:g} GB; {machine(torch.device('cpu'))}\n\n{markdown_table(header, rows)}\n\n"
        "What came back is what went out, to the bit."
    )


if __name__ == "__main__":
    main()
