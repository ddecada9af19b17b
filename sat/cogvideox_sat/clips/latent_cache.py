"""Latents and text embeddings computed once: the files of a cache of them.

A cache is a folder, made by `tools/precompute_latents.py`, with
  * `cache.json`, an object: `format`, the version of what is described here; `model`, what the cached numbers depend on
    (`latent_identity.describe_model`); `data`, sources, settings and number of samples; `encoding`, how they were
    encoded; `reader`, what decoded the videos (`clips.reader_record`);
  * shards `rank0000-00000.safetensors`, ..., each complete in itself: tensors, and in the metadata of the header,
    under `content` as JSON, what they are: `samples`, the fields of every `CachedSample`, and `skipped`, the indices of
    samples that could not be read, with the files at fault;
  * `unreadable.txt`, those files with the reasons, one a line, if there are any.

Of the sample i of the data set there are
  * `{i}.moments` (2c, t, h, w), means and then log-variances of the clip's posterior, or `{i}.latents` (c, t, h, w),
    one draw from it; both unscaled;
  * for image-to-video `{i}.image_moments.{v}` (2c, 1, h, w), or `{i}.image_latents.{v}` (c, 1, h, w): the first frame
    encoded with the noise that the sample adds to it in epoch v; and where the model's `conditioning` tells other
    frames, `{i}.key_moments.{v}` (2c, t - 1, h, w), or `{i}.key_latents.{v}`, those that it may tell, each encoded by
    itself;
  * `{i}.text` (tokens, features), its caption's embedding, unless an earlier sample of the shard has the same caption.

Clips start where they start in epoch 0. Nothing here imports PyTorch until a shard is opened.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cogvideox_sat.commands.program_names import as_started
from cogvideox_sat.files.training_state import anything, count, find_misfit, list_of, mapping_of, number, reader, text
from sgm.errors import UserError, shown
from sgm.plain_json import parse_json

FORMAT = 1
DESCRIPTION = "cache.json"
SHARDS = "rank*-*.safetensors"
STORES = ("moments", "latents")
REMEDY = as_started("run tools/precompute_latents.py")


def is_cache(path: str | Path) -> bool:
    """Whether `path` is a folder made by `tools/precompute_latents.py`, finished or not."""
    return (Path(path) / DESCRIPTION).is_file()


@dataclass(frozen=True, slots=True)
class CachedSample:
    """A sample of a shard.

    Args:
        index: its place in the data set that was encoded.
        bucket: (frames, height, width) of its clip in pixels.
        caption: its text.
        text: index of the sample whose `.text` is its embedding.
        fps: frames a second.
    """

    index: int
    bucket: tuple[int, int, int]
    caption: str
    text: int
    fps: float


@dataclass(frozen=True)
class Shard:
    """What the header of a shard tells."""

    path: Path
    samples: list[CachedSample]
    skipped: dict[int, list[str]]

    @property
    def indices(self) -> set[int]:
        """All samples that were taken care of, whether they could be read or not."""
        return {sample.index for sample in self.samples} | self.skipped.keys()


def _params(value: Any) -> bool:
    """A data section: its params are a mapping, or left out."""
    return mapping_of(anything)(value) and isinstance(value.get("params") or {}, Mapping)


LAYOUT = {  # of `cache.json`
    "model": {"VAE": mapping_of(anything), "text encoder": mapping_of(anything)},
    "data": {"samples": count, "config": _params},
    "encoding": {"image_variants": count, "key_frames?": anything},
    "reader?": reader,
}


def _sample(value: Any) -> bool:
    """The fields of a `CachedSample`."""
    checks = {"index": count, "bucket": list_of(count, 3), "caption": text, "text": count, "fps": number}
    return isinstance(value, Mapping) and all(name in value and check(value[name]) for name, check in checks.items())


SHARD_LAYOUT = {"samples": list_of(_sample), "skipped": mapping_of(list_of(text))}  # of the `content` of a shard


def read_description(folder: str | Path) -> dict[str, Any]:
    """The content of `cache.json`.

    Raises:
        UserError: it cannot be read, or another version of this program wrote it.
    """
    path = Path(folder) / DESCRIPTION
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        version = content["format"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe latents; {REMEDY} into another folder") from error
    if version != FORMAT:
        raise UserError(
            f"{path} is of format {shown(version)}, this program reads {FORMAT}: {REMEDY} into another folder"
        )
    if misfit := find_misfit(content, LAYOUT):
        raise UserError(f"{path} does not describe latents: {misfit}; {REMEDY} into another folder")
    return content


def read_shards(folder: str | Path) -> list[Shard]:
    """The complete shards of a cache, in the order of their names.

    Raises:
        UserError: one is damaged.
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
        raise UserError(f"{path} is no shard of latents; {REMEDY} into another folder") from error
    return Shard(path, samples, skipped)


def open_shard(path: Path) -> Any:
    """The shard mapped into memory; its tensors are read when they are asked for.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is damaged ({reason}): delete it and {REMEDY} again") from error
