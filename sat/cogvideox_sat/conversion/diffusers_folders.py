"""Read and write the folder of a CogVideoX pipeline, without using diffusers.

model_index.json                                  the classes of the parts
transformer/  config.json, diffusion_pytorch_model*.safetensors, ...safetensors.index.json if there are several
vae/          config.json, diffusion_pytorch_model.safetensors
scheduler/    scheduler_config.json
text_encoder/, tokenizer/                         T5, as transformers writes it
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cogvideox_sat.conversion.safetensors_writing import check_equal, split, stream_safetensors
from cogvideox_sat.conversion.stored_weights import StoredWeights, open_weights
from cogvideox_sat.files.refusals import refusal
from cogvideox_sat.weights.diffusers_names import EXTRA_TABLES
from sgm.errors import UserError
from sgm.plain_json import parse_json
from sgm.weights import DIFFUSERS_FILES, INDEX_SUFFIX, PIPELINE_FILE, safetensors_in

_, WEIGHTS_NAME = DIFFUSERS_FILES


def is_pipeline(folder: Path) -> bool:
    """Return whether a folder is a pipeline of diffusers."""
    return (folder / PIPELINE_FILE).is_file()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write content as JSON, into a folder that is made if it does not exist."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_part(
    folder: Path, config: Mapping[str, Any], weights: StoredWeights, shard_bytes: int, file_name: str = WEIGHTS_NAME
) -> None:
    """Write config.json and the tensors of a part, and check them by reading them back.

    The tensors are in several files if they have more than `shard_bytes`.

    Args:
        file_name: the name of the tensors' file if there is only one: diffusers' name, or transformers'.

    Raises:
        UserError: the tensors do not read back as they were written.
    """
    write_json(folder / "config.json", config)
    shards = split(weights, shard_bytes)
    names = [file_name]
    if len(shards) > 1:
        stem, suffix = file_name.split(".", 1)
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.{suffix}" for i in range(len(shards))]
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": weights.nbytes}, "weight_map": weight_map}
        write_json(folder / f"{stem}{INDEX_SUFFIX}", index)
    with tqdm(total=2 * len(weights), desc=folder.name, unit="tensor", leave=False) as bar:
        for name, shard in zip(names, shards, strict=True):
            stream_safetensors(folder / name, shard, bar.update)
        check_equal(open_weights(safetensors_in(folder)), weights, folder, bar.update)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        UserError: the file does not exist, or does not hold a JSON object.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; copy or download the whole folder") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {refusal(error)}") from error
    except ValueError as error:
        raise UserError(f"cannot read {path}: not JSON: {' '.join(str(error).split())}; download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; download it again")
    return content


def read_part(folder: Path, class_name: str) -> tuple[dict[str, Any], StoredWeights]:
    """Return config.json and the tensors of a part of a pipeline.

    Raises:
        UserError: they cannot be read, or the part has another class.
    """
    config = read_json(folder / "config.json")
    if config.get("_class_name") != class_name:
        raise UserError(f"{folder}: got a {config.get('_class_name')}; expected a {class_name}")
    return config, open_weights(safetensors_in(folder))


def read_extra_tables(folder: Path) -> StoredWeights:
    """Return the tensors in `EXTRA_TABLES` beside diffusers' files, by our names."""
    path = folder / EXTRA_TABLES
    return open_weights(path) if path.is_file() else StoredWeights({})
