"""The folder of a cache of latents: what it describes, what it lacks, and its size."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cogvideox_sat.clips.latent_cache import (
    DESCRIPTION,
    FORMAT,
    SHARDS,
    is_cache,
    read_description,
    read_shards,
)
from cogvideox_sat.clips.latent_identity import describe_model
from cogvideox_sat.clips.reader_record import KEY, warn_of_other_reader
from cogvideox_sat.configuration.data_mixing import repeated
from cogvideox_sat.configuration.merging import first_difference
from cogvideox_sat.configuration.training_arguments import TrainingArguments
from cogvideox_sat.files.atomic import replaced_when_complete
from cogvideox_sat.files.sizes import free_bytes, in_units
from cogvideox_sat.latent_geometry import SPACE_FACTOR, TIME_FACTOR, Bucket
from sgm.errors import UserError

logger = logging.getLogger(__name__)

UNREADABLE = "unreadable.txt"


def describe(args: TrainingArguments, dataset: Any, encoding: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `cache.json`; runs with equal content fill the same cache."""
    buckets = [tuple(dataset.bucket(index)) for index in range(len(dataset))]
    data = {
        "sources": [str(Path(path).resolve()) for path in repeated(args.train_data, args.train_data_repeats)],
        "config": args.data_config,
        "samples": len(dataset),
        "buckets": hashlib.blake2b(repr(buckets).encode(), digest_size=16).hexdigest(),
    }
    content = {"format": FORMAT, "model": describe_model(args.model_config), "data": data, "encoding": dict(encoding)}
    if reader := getattr(dataset, "reader", None):
        content[KEY] = reader
    return json.loads(json.dumps(content))  # with the types that reading the file returns


def without_reader(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description without the decoder of the videos.

    With another decoder, a cache is continued after a warning.
    """
    content = {name: value for name, value in description.items() if name != KEY}
    config = content["data"]["config"]
    params = {name: value for name, value in (config.get("params") or {}).items() if name != "video_backend"}
    content["data"] = {**content["data"], "config": {**config, "params": params}}
    return content


def check_folder(folder: Path, description: Mapping[str, Any], dataset: Any) -> set[int]:
    """Return the samples that are already in the cache.

    Raises:
        UserError: the folder has other content, or a cache of other data or settings; or the disk is too small.
    """
    if is_cache(folder):
        before = read_description(folder)
        warn_of_other_reader(str(folder), before, description.get(KEY))
        if difference := first_difference(without_reader(before), without_reader(description)):
            name, there, here = difference
            raise UserError(
                f"{folder} was begun with other settings: {name} is {json.dumps(there)} there and {json.dumps(here)} "
                "now; give --output another folder"
            )
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and not a cache of latents; give --output a new folder")
    done = set().union(*(shard.indices for shard in read_shards(folder)))
    needed = sum(sample_bytes(dataset.bucket(i), description) for i in range(len(dataset)) if i not in done)
    free = free_bytes(folder / DESCRIPTION)
    logger.info("%s: %d of %d samples to encode, %s", folder, len(dataset) - len(done), len(dataset), in_units(needed))
    if needed > free:
        raise UserError(f"the cache needs up to {in_units(needed)} more in {folder}, but {in_units(free)} are free")
    return done


def prepare_folder(folder: Path, description: Mapping[str, Any]) -> None:
    """Create the folder with its `cache.json`, and remove what a killed run left.

    Raises:
        UserError: the folder cannot be written.
    """
    if not is_cache(folder):
        with replaced_when_complete(folder / DESCRIPTION) as part:
            part.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    for path in folder.glob(f".{SHARDS}.*.part"):
        path.unlink(missing_ok=True)


def sample_bytes(bucket: Bucket, description: Mapping[str, Any]) -> int:
    """Return the size of a sample in a cache, if no other sample has its caption."""
    encoding, model = description["encoding"], description["model"]
    channels = model["VAE"]["z_channels"] * (2 if encoding["store"] == "moments" else 1)
    frames = (bucket.frames - 1) // TIME_FACTOR + 1
    frames += encoding["image_variants"] * (frames if encoding.get("key_frames") else 1)
    latents = channels * frames * (bucket.height // SPACE_FACTOR) * (bucket.width // SPACE_FACTOR)
    text = model["text encoder"]["tokens"] * model["text encoder"]["features"]
    return (latents + text) * getattr(torch, encoding["dtype"]).itemsize


def finish(folder: Path, dataset: Any) -> None:
    """Write the list of unreadable files, and log a summary."""
    shards = read_shards(folder)
    skipped = {path for shard in shards for paths in shard.skipped.values() for path in paths}
    unreadable = sorted({*skipped, *dataset.unreadable})
    encoded, left_out = sum(len(shard.samples) for shard in shards), sum(len(shard.skipped) for shard in shards)
    if unreadable:
        with replaced_when_complete(folder / UNREADABLE) as part:
            part.write_text("".join(f"{path}\n" for path in unreadable), encoding="utf-8")
        logger.warning("%d unreadable files, listed in %s", len(unreadable), folder / UNREADABLE)
    size = sum(shard.path.stat().st_size for shard in shards)
    logger.info("%s is complete: %d samples, %d left out, %s", folder, encoded, left_out, in_units(size))
