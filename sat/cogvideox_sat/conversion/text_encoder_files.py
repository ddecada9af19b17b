"""Find, check and write the files of a T5 text encoder and its tokenizer."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from cogvideox_sat.conversion.diffusers_folders import read_json, write_part
from cogvideox_sat.conversion.stored_weights import Stored, StoredWeights, open_weights
from sgm.errors import UserError
from sgm.weights import INDEX_SUFFIX, read_weight_map

TEXT_WEIGHTS_NAME = "model.safetensors"  # transformers' name
_ENCODER_FILE = re.compile(r"(generation_)?config\.json|(model|pytorch_model)[\w-]*\.(safetensors|bin)(\.index\.json)?")
_TOKENIZER_FILE = re.compile(r"spiece\.model|(tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json")


def text_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of a T5 encoder and of its tokenizer below `folder`.

    They are in the folder itself, or in `text_encoder` and `tokenizer`, or in one of these ways in the only snapshot of
    a cache of the hub.

    Raises:
        UserError: files are missing, or the cache holds several models.
    """
    snapshots = [path for path in folder.glob("models--*/snapshots/*") if path.is_dir()]
    if len(snapshots) > 1:
        raise UserError(f"{folder} holds {len(snapshots)} models of the hub; name the folder of T5, snapshots/...")
    folder = snapshots[0] if snapshots else folder
    encoder = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    tokenizer = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    encoder_files = _matching(encoder, _ENCODER_FILE)
    if any(file.suffix == ".safetensors" for file in encoder_files):
        encoder_files = [file for file in encoder_files if ".bin" not in file.name]
    tokenizer_files = _matching(tokenizer, _TOKENIZER_FILE)
    names = {file.name for file in encoder_files}
    if "config.json" not in names or not any(file.suffix in (".safetensors", ".bin") for file in encoder_files):
        raise UserError(f"{encoder}: no T5 encoder; expected config.json and model*.safetensors")
    if not any(file.name in ("spiece.model", "tokenizer.json") for file in tokenizer_files):
        raise UserError(f"{tokenizer}: no tokenizer; expected spiece.model or tokenizer.json")
    for index in (file for file in encoder_files if file.name.endswith((INDEX_SUFFIX, ".bin.index.json"))):
        read_weight_map(index)  # checks that the files in the index exist
    return encoder_files, tokenizer_files


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.is_file() and pattern.fullmatch(file.name))


def check_text_encoder(encoder_files: Sequence[Path], hidden_size: int) -> None:
    """Check that the encoder is a T5 of the width `hidden_size`, else raise UserError."""
    file = next(file for file in encoder_files if file.name == "config.json")
    config = read_json(file)
    if config.get("model_type") != "t5" or config.get("d_model") != hidden_size:
        raise UserError(
            f"{file}: the text encoder is a {config.get('model_type')} of width {config.get('d_model')}; the network "
            f"takes a t5 of width {hidden_size}"
        )


def write_text_encoder(files: Sequence[Path], folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    """Write the text encoder in `files`, see `text_files`, into a folder, in `dtype`."""
    entries: dict[str, Stored] = {}
    for file in files:
        if file.suffix in (".safetensors", ".bin"):
            entries |= open_weights(file).entries
    config = read_json(next(file for file in files if file.name == "config.json"))
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_part(folder, config, StoredWeights(entries).cast(dtype), shard_bytes, TEXT_WEIGHTS_NAME)
    copy_files([file for file in files if file.name == "generation_config.json"], folder)


def copy_files(files: Sequence[Path], folder: Path) -> None:
    """Copy files into a folder, piece by piece, and check their sizes.

    Raises:
        UserError: a file changed meanwhile.
    """
    folder.mkdir(exist_ok=True)
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc=folder.name, unit="B", unit_scale=True, leave=False) as bar:
        for file in files:
            with file.open("rb") as source, (folder / file.name).open("wb") as sink:
                while block := source.read(2**24):
                    bar.update(sink.write(block))
    for file in files:
        target = folder / file.name
        if target.stat().st_size != file.stat().st_size:
            raise UserError(f"{file} changed while it was copied; copy it again")
