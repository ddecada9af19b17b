"""Seconds and memory of converting a checkpoint of a released model's size to diffusers and back.

    python benchmarks/conversion.py [--family 5b] [--max-shard-size 1] [--folder /scratch] [--write]

Network and VAE have all tensors of the released model, with random values. Each command runs in a process of its own,
which is looked at again and again: its resident memory counts what it has mapped of the files it reads, its anonymous
memory does not. What comes back must be what went out, to the bit. Linux only; takes three times the size of the model
on the disk.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "sat"), str(ROOT / "benchmarks")]

from harness import machine, markdown_table, write_results  # noqa: E402

from checkpoint_folders import write_checkpoint, write_tensors  # noqa: E402
from config_files import load_configs  # noqa: E402
from diffusers_folders import check_equal  # noqa: E402
from model_sizes import CONFIG_FOLDER  # noqa: E402
from network_files import checkpoint_file  # noqa: E402
from network_weights import instantiate_on_meta  # noqa: E402
from stored_weights import open_weights  # noqa: E402
from weight_family import CONFIGS, TITLES  # noqa: E402

INTERVAL = 0.01  # seconds between two looks at a process


@dataclass
class Usage:
    """Of one process: seconds, those of them on a processor, and the most GiB of resident and of anonymous memory."""

    seconds: float = 0.0
    busy: float = 0.0
    resident: float = 0.0
    anonymous: float = 0.0


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        make_checkpoints(args, folder)
        out, back = folder / "diffusers", folder / "sat"
        forth = ["convert_weight_sat2hf.py", "--transformer_ckpt_path", folder / "network", "--output_path", out]
        forth += ["--vae_ckpt_path", folder / "3d-vae.pt", "--max_shard_size", args.max_shard_size]
        usages = {"to diffusers": run(args, forth)}
        usages["back"] = run(args, ["convert_weight_hf2sat.py", "--hf_path", out, "--output_path", back])
        for ours, theirs in (
            (folder / "network", back / "transformer"),
            (folder / "3d-vae.pt", back / "vae/3d-vae.pt"),
        ):
            check_equal(open_weights(file_of(theirs)), open_weights(file_of(ours)), back)
        text = report(args, usages, largest(out))
    print(text)  # noqa: T201
    if args.write:
        write_results(f"Conversion, {CONFIGS[args.family]}, files of at most {args.max_shard_size:g} GB", text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(CONFIGS), default="2b")
    parser.add_argument("--max-shard-size", type=float, default=5, metavar="GB", help="of files for diffusers")
    parser.add_argument("--folder", type=Path, help="where files are written and removed (default: the system's)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def make_checkpoints(args: argparse.Namespace, folder: Path) -> None:
    """The network in the released model's dtype, its tables of positions as they are computed; the VAE in float32."""
    config = load_configs([CONFIG_FOLDER / f"{CONFIGS[args.family]}.yaml"])
    dtype = torch.float16 if config["args"].get("fp16") else torch.bfloat16
    network = instantiate_on_meta(config["model"]["network_config"]).to(dtype).state_dict()
    write_checkpoint(folder / "network", network, lambda name: random_like(network[name]))
    coder = config["model"]["first_stage_config"]
    coder["params"]["ckpt_path"] = None
    vae = instantiate_on_meta(coder).state_dict()
    write_tensors(folder / "3d-vae.pt", vae, lambda name: random_like(vae[name]), key="state_dict", prefix="")


def random_like(tensor: Tensor) -> Tensor:
    """Random values in place of those on the meta device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).normal_(std=0.02) if tensor.is_meta else tensor


def run(args: argparse.Namespace, command: list[object]) -> Usage:
    """Run a tool, and look at its memory until it ends."""
    command = [sys.executable, str(ROOT / "tools" / str(command[0])), *map(str, command[1:])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    usage, start, busy = Usage(), time.perf_counter(), processor_seconds()
    with subprocess.Popen(command, env=environment) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            usage.resident = max(usage.resident, gib(status, "VmHWM"))
            usage.anonymous = max(usage.anonymous, gib(status, "RssAnon"))
            time.sleep(INTERVAL)
    usage.seconds, usage.busy = time.perf_counter() - start, processor_seconds() - busy
    if process.returncode:
        raise SystemExit(f"{command[1]} failed")
    return usage


def processor_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def gib(status: str, entry: str) -> float:
    match = re.search(rf"{entry}:\s*(\d+) kB", status)
    return int(match[1]) / 2**20 if match else 0.0  # a process that has ended has no such line


def file_of(path: Path) -> Path:
    return checkpoint_file(path)[0] if path.is_dir() else path


def largest(folder: Path) -> float:
    """GiB of the largest file in a folder."""
    return max(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**30


def report(args: argparse.Namespace, usages: dict[str, Usage], shard: float) -> str:
    rows = [
        [name, use.seconds, use.busy, use.resident, use.resident / shard, use.anonymous, use.anonymous / shard]
        for name, use in usages.items()
    ]
    header = ["", "s", "on a processor, s", "resident GiB", "/ largest file", "anonymous GiB", "/ largest file"]
    return (
        f"{TITLES[args.family]} and VAE, random; files for diffusers of at most {args.max_shard_size:g} GB, "
        f"the largest of {shard:.3g} GiB; {machine(torch.device('cpu'))}\n\n{markdown_table(header, rows)}\n\n"
        "What came back is what went out, to the bit."
    )


if __name__ == "__main__":
    main()
