"""Find the files that a record names, and describe them by path and hash."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cogvideox_sat.configuration.adapter_lists import path_and_weight
from cogvideox_sat.configuration.argument_lists import SamplingArguments
from cogvideox_sat.files.content_hashes import hash_of_file
from cogvideox_sat.weights.checkpoint_files import checkpoint_shares
from sgm.errors import UserError
from sgm.weights import INDEX_SUFFIX, PIPELINE_FILE, read_weight_map, safetensors_in


def weight_files(args: SamplingArguments) -> dict[str, list[Path]]:
    """Return the weight files of a sampling run, by role.

    The list of a missing file is empty.
    """
    vae, text_encoder = vae_path(args.model_config), text_encoder_path(args.model_config)
    further = {name: adapter_files(path) for name, path, _ in adapters_of(args) if name != "adapter"}
    return {
        "vae": vae_files(Path(vae)) if vae else [],
        "adapter": network_files(args.lora_load) if args.lora_load else [],
        "checkpoint": network_files(args.load) if args.load else [],
        "text_encoder": text_encoder_files(Path(text_encoder)) if text_encoder else [],
        **further,
    }


def vae_path(model_config: Mapping[str, Any]) -> str | None:
    """Return the path of the VAE's weights in a `model:` section, None if missing."""
    return (model_config["first_stage_config"].get("params") or {}).get("ckpt_path")


def text_encoder_path(model_config: Mapping[str, Any]) -> str | None:
    """Return the folder of the text encoder in a `model:` section, None if missing."""
    embedders = (model_config["conditioner_config"].get("params") or {}).get("emb_models") or [{}]
    return (embedders[0].get("params") or {}).get("model_dir")


def adapters_of(args: SamplingArguments) -> list[tuple[str, str, float]]:
    """Return the adapters of a run: name of the hash, path, strength."""
    if args.lora_load:
        return [("adapter", args.lora_load, args.lora_scale)]
    return [(f"adapter {n + 1}", str(path), weight) for n, (path, weight) in enumerate(map(path_and_weight, args.lora))]


def adapter_files(path: str) -> list[Path]:
    """Return the files of an adapter in any supported format."""
    return network_files(path) or ([Path(path)] if Path(path).is_file() else sorted(Path(path).glob("*.safetensors")))


def network_files(path: str) -> list[Path]:
    """Return the files of a network's checkpoint in any supported format."""
    try:
        found = checkpoint_shares(path)
    except UserError:  # loading the checkpoint reports the error
        return []
    return sorted({file for first in found for file in with_shards(first)})


def vae_files(path: Path) -> list[Path]:
    """Return the files of a VAE: one file, or the safetensors files of a folder."""
    if not path.is_dir():
        return with_shards(path) if path.is_file() else []
    with suppress(UserError):
        return with_shards(safetensors_in(path / "vae" if (path / PIPELINE_FILE).is_file() else path))
    return []


def text_encoder_files(folder: Path) -> list[Path]:
    """Return the files of a text encoder that are read: weights, vocabulary and settings."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return [*weights, *sorted(folder.glob("*.json")), *sorted(folder.glob("*.model"))]


def with_shards(file: Path) -> list[Path]:
    """Return a weight file, or an index and the files that it lists."""
    if not file.name.endswith(INDEX_SUFFIX):
        return [file]
    with suppress(UserError):
        return [file, *sorted({file.parent / name for name in read_weight_map(file).values()})]
    return [file]


def described(path: str | None, digest: str | None) -> dict[str, Any] | None:
    """Return the entry of a file or folder in a record, None if the path is empty."""
    return described_file(path, digest) if path else None


def described_file(path: str, digest: str | None) -> dict[str, Any]:
    """Return the entry of a file or folder in a record.

    Args:
        digest: hash of the content; None: not known.
    """
    return {"path": str(Path(path).resolve()) if Path(path).exists() else str(path), "hash": digest}


def described_input(path: Path | None) -> dict[str, Any] | None:
    """Return the entry of a picture or clip in a record, None for no file.

    The hash of a file that cannot be read is None.
    """
    if path is None:
        return None
    digest = None
    with suppress(OSError):
        digest = f"sha256:{hash_of_file(path)}"
    return described(str(path), digest)
