"""The forms of weights, made of random numbers, and their readers; for `loading.py`."""

import argparse
import json
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from harness import ROOT
from torch import Tensor

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.meta_device import instantiate_on_meta
from cogvideox_sat.conversion.checkpoint_folders import write_checkpoint
from cogvideox_sat.conversion.diffusers_folders import write_part
from cogvideox_sat.conversion.safetensors_writing import stream_safetensors
from cogvideox_sat.conversion.stored_weights import Stored, StoredWeights
from cogvideox_sat.conversion.zero_checkpoints import read_zero
from cogvideox_sat.parallel.process_groups import initialize_process_groups
from cogvideox_sat.weights.diffusers_names import assembled_shape, to_diffusers
from cogvideox_sat.weights.loading import load_network
from sgm.modules.encoders.t5_loading import load_t5

GIB = 2**30
SHARD_BYTES, DIFFUSERS_SHARD_BYTES = 10**9, 5 * 10**9
RANK = 128  # of the adapter
TOKENIZER = ROOT / "assets" / "tiny" / "t5" / "spiece.model"
FILE_DTYPE = torch.float16  # of the network, as the 2B is released


def largest_file(folder: Path) -> float:
    """Return the size of the largest file in a folder, in GiB."""
    return max(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / GIB


def network_on_meta(args: argparse.Namespace, dtype: torch.dtype, lora: bool = False) -> torch.nn.Module:
    config = load_configs([ROOT / "configs" / f"{args.model}.yaml"])["model"]["network_config"]
    if lora:
        params = {"r": RANK}
        config["params"]["modules"]["lora_config"] = {
            "target": "sat.model.finetune.lora2.LoraMixin",
            "params": params,
        }
    initialize_process_groups()
    return instantiate_on_meta(config).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


class _Numbers:
    """Random numbers for tensors of any size, repeated from one table."""

    def __init__(self) -> None:
        self.block = torch.empty(2**22).normal_(std=0.02)

    def fill(self, tensor: Tensor) -> Tensor:
        flat = tensor.view(-1)
        for begin in range(0, len(flat), len(self.block)):
            part = flat[begin : begin + len(self.block)]
            part.copy_(self.block[: len(part)])
        return tensor

    def like(self, tensor: Tensor) -> Tensor:
        return self.fill(torch.empty(tensor.shape, dtype=tensor.dtype)) if tensor.is_meta else tensor

    def stored(self, tensors: Mapping[str, Tensor]) -> StoredWeights:
        return StoredWeights(
            {
                name: Stored(tensor.shape, tensor.dtype, lambda tensor=tensor: self.like(tensor))
                for name, tensor in tensors.items()
            }
        )


def make(args: argparse.Namespace, form: str, folder: Path) -> float:
    """Write the files of a form, and return the GiB of the loaded weights."""
    kind, _, dtype = form.partition(" ")
    if kind == "t5":
        return _make_t5(args, folder) * (2 if dtype == "float32" else 1)
    numbers, state = _Numbers(), network_on_meta(args, FILE_DTYPE).state_dict()
    size = sum(tensor.nbytes for tensor in state.values())
    shard_bytes = min(SHARD_BYTES, size // 3)
    if kind in ("pt", "lora"):
        write_checkpoint(folder / "network", state, lambda name: numbers.like(state[name]))
    if kind == "lora":
        adapter = {
            name: tensor
            for name, tensor in network_on_meta(args, FILE_DTYPE, lora=True).state_dict().items()
            if ".matrix_" in name
        }
        write_checkpoint(folder / "lora", adapter, lambda name: numbers.like(adapter[name]))
    if kind == "safetensors":
        stream_safetensors(folder / "network.safetensors", numbers.stored(state))
    if kind == "sharded":
        write_part(folder, {}, numbers.stored(state), shard_bytes, "model.safetensors")
    if kind == "diffusers":
        write_part(folder, {}, _of_diffusers(numbers, state), DIFFUSERS_SHARD_BYTES)
    if kind == "zero":
        _make_zero(numbers, state, folder)
    return size / GIB * (2 if kind == "zero" else 1)


def _of_diffusers(numbers: _Numbers, state: Mapping[str, Tensor]) -> StoredWeights:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    pieces = to_diffusers(state)
    meta = {
        name: torch.empty(assembled_shape(parts, shapes), dtype=FILE_DTYPE, device="meta")
        for name, parts in pieces.items()
    }
    return numbers.stored(meta)


def _make_zero(numbers: _Numbers, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the files of two ZeRO-2 processes with float32 weights in one group."""
    count = sum(tensor.numel() for tensor in state.values())
    half = -(-count // 2)
    for rank, length in enumerate((half, count - half + (2 * half - count))):
        scratch = folder / "scratch"
        piece = numbers.fill(torch.from_file(str(scratch), shared=True, size=length))
        content = {"zero_stage": 2, "partition_count": 2, "single_partition_of_fp32_groups": [piece]}
        torch.save({"optimizer_state_dict": content}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        del piece, content
        scratch.unlink()
    shapes = OrderedDict((name, tensor.shape) for name, tensor in state.items())
    torch.save({"module": {}, "param_shapes": [shapes]}, folder / "mp_rank_00_model_states.pt")


def _make_t5(args: argparse.Namespace, folder: Path) -> float:
    from transformers import T5Config, T5EncoderModel

    width = args.t5_width
    config = T5Config(
        vocab_size=32128,
        d_model=width,
        d_kv=64,
        num_heads=width // 64,
        d_ff=width * 5 // 2,
        num_layers=args.t5_layers,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        state = T5EncoderModel(config).to(torch.bfloat16).state_dict()
    state.pop("encoder.embed_tokens.weight", None)  # the same as shared.weight
    stream_safetensors(folder / "model.safetensors", _Numbers().stored(state))
    described: dict[str, Any] = {**config.to_dict(), "architectures": ["T5EncoderModel"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(described))
    shutil.copy(TOKENIZER, folder)
    return sum(tensor.nbytes for tensor in state.values()) / GIB


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read(args: argparse.Namespace, form: str, path: str) -> None:
    """Load the files of `make`, and read every number."""
    folder, (kind, _, dtype) = Path(path), form.partition(" ")
    if kind == "lora":
        from tools.merge_lora import main

        where = ["--load", str(folder / "network"), "--lora", str(folder / "lora"), "--output", str(folder / "merged")]
        if main(where):
            raise SystemExit("merging failed")
    elif kind == "zero":
        weights = read_zero(folder)
        look_at(weights[name] for name in weights)
    elif kind == "t5":
        look_at(load_t5(str(folder), dtype=dtype or None).model.parameters())
    else:
        network = network_on_meta(args, getattr(torch, dtype) if dtype else FILE_DTYPE)
        file = {"pt": "network", "safetensors": "network.safetensors"}.get(kind, "")
        load_network(network, folder / file, device="cpu")
        look_at(network.parameters())


def look_at(tensors: Iterable[Tensor]) -> None:
    """Read every byte, a piece at a time, since sums convert their input."""
    for tensor in tensors:
        if not all(piece.sum(dtype=torch.float32).isfinite() for piece in tensor.detach().view(-1).split(2**20)):
            raise SystemExit("the weights are not finite")
