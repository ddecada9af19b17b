"""Read the files of a cache of latents and text embeddings.

A cache is a folder, made by `tools/precompute_latents.py`, with
  * `cache.json`, an object: `format`, the version of this layout; `model`, the properties of the model that the cached
    numbers depend on (`latent_identity.describe_model`); `data`, sources, settings and number of samples; `encoding`,
    how they were encoded; `reader`, the decoder of the videos (`clips.reader_record`);
  * shards `rank0000-00000.safetensors`, ..., each complete in itself: tensors, and in the metadata of the header,
    under `content` as JSON, their descriptions: `samples`, the fields of every `CachedSample`, and `skipped`, the
    indices of samples that could not be read, with the unreadable files;
  * `unreadable.txt`, those files with the reasons, one per line, if there are any.

For the sample i of the data set, a shard holds
  * `{i}.moments` (2c, t, h, w), means and then log-variances of the clip's posterior, or `{i}.latents` (c, t, h, w),
    one draw from it; both unscaled;
  * for image-to-video `{i}.image_moments.{v}` (2c, 1, h, w), or `{i}.image_latents.{v}` (c, 1, h, w): the first frame
    encoded with the noise that the sample adds to it in epoch v; and if the model's `conditioning` has other frames,
    `{i}.key_moments.{v}` (2c, t - 1, h, w), or `{i}.key_latents.{v}`: the frames that may be given, each encoded by
    itself;
  * `{i}.text` (tokens, features), its caption's embedding, unless an earlier sample of the shard has the same caption.

Clips start where they start in epoch 0. Nothing here imports PyTorch until a shard is opened.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cogvideox_sat.commands.program_names import as_started
from cogvideox_sat.files.refusals import refusal, why_unreadable
from cogvideox_sat.files.training_state import anything, count, find_misfit, list_of, mapping_of, number, reader, text
from sgm.errors import UserError, shown
from sgm.plain_json import parse_json

FORMAT = 1
DESCRIPTION = "cache.json"
SHARDS = "rank*-*.safetensors"
STORES = ("moments", "latents")
REMEDY = as_started("run tools/precompute_latents.py")


def is_cache(path: str | Path) -> bool:
    """Return whether a path is a folder of `tools/precompute_latents.py`, complete or not."""
    return os.path.isfile(Path(path) / DESCRIPTION)  # noqa: PTH113, `Path.is_file` may raise


@dataclass(frozen=True, slots=True)
class CachedSample:
    """Sample of a shard.

    Attributes:
        index: position in the data set that was encoded.
        bucket: (frames, height, width) of the clip in pixels.
        caption: the clip's caption.
        text: index of the sample whose `.text` is the embedding of the caption.
        fps: frames per second.
    """

    index: int
    bucket: tuple[int, int, int]
    caption: str
    text: int
    fps: float


@dataclass(frozen=True)
class Shard:
    """Content of a shard's header."""

    path: Path
    samples: list[CachedSample]
    skipped: dict[int, list[str]]

    @property
    def indices(self) -> set[int]:
        """Return the indices of all samples in the shard, including those that were unreadable."""
        return {sample.index for sample in self.samples} | self.skipped.keys()


def _params(value: Any) -> bool:
    """Return whether the value is a data section: its params are a mapping, or missing."""
    return mapping_of(anything)(value) and isinstance(value.get("params") or {}, Mapping)


LAYOUT = {  # layout of `cache.json`
    "model": {"VAE": mapping_of(anything), "text encoder": mapping_of(anything)},
    "data": {"samples": count, "config": _params},
    "encoding": {"image_variants": count, "key_frames?": anything},
    "reader?": reader,
}


def _sample(value: Any) -> bool:
    """Return whether the value has the fields of a `CachedSample`."""
    checks = {"index": count, "bucket": list_of(count, 3), "caption": text, "text": count, "fps": number}
    return isinstance(value, Mapping) and all(name in value and check(value[name]) for name, check in checks.items())


SHARD_LAYOUT = {"samples": list_of(_sample), "skipped": mapping_of(list_of(text))}  # layout of a shard's `content`


def read_description(folder: str | Path) -> dict[str, Any]:
    """Return the content of `cache.json`.

    Raises:
        UserError: the file cannot be read, or was written by another version of this program.
    """
    path = Path(folder) / DESCRIPTION
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        version = content["format"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {refusal(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe latents; {REMEDY} into another folder") from error
    if version != FORMAT:
        raise UserError(
            f"{path} has format {shown(version)}, but this program reads {FORMAT}; {REMEDY} into another folder"
        )
    if misfit := find_misfit(content, LAYOUT):
        raise UserError(f"{path} does not describe latents: {misfit}; {REMEDY} into another folder")
    return content


def read_shards(folder: str | Path) -> list[Shard]:
    """Return the complete shards of a cache, in the order of their names.

    Raises:
        UserError: a shard is damaged.
    """
    return [_read_shard(path) for path in sorted(Path(folder).glob(SHARDS))]


def _read_shard(path: Path) -> Shard:
    metadata = open_shard(path).metadata() or {}
    try:
        content = parse_json(metadata["content"])
        if find_misfit(content, SHARD_LAYOUT):
            raise ValueError
        samples = [CachedSample(**{**fields, "bucket": tuple(fields["bucket"])}) for fields in content["samples"]]
        skipped = {int(index): files for index, files in content["skipped"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a shard of latents; {REMEDY} into another folder") from error
    return Shard(path, samples, skipped)


def open_shard(path: Path) -> Any:
    """Return the shard mapped into memory; its tensors are read when they are needed.

    Raises:
        UserError: the shard is missing or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        if unreadable := why_unreadable(path):  # the library reports this as a missing file
            raise UserError(f"cannot read {path}: {unreadable}") from error
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is damaged ({reason}); delete it and {REMEDY} again") from error
