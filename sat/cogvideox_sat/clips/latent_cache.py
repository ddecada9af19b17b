"""Latents and text embeddings computed once: what a cache of them looks like, and training data read from it.

A cache is a folder, made by `tools/precompute_latents.py`, with
  * `cache.json`, an object: `format`, the version of what is described here; `model`, what the cached numbers depend on
    (`describe_model`); `data`, sources, settings and number of samples; `encoding`, how they were encoded; `reader`,
    what decoded the videos (`clips.reader_record`);
  * shards `rank0000-00000.safetensors`, ..., each complete in itself: tensors, and in the metadata of the header,
    under `content` as JSON, what they are: `samples`, the fields of every `CachedSample`, and `skipped`, the indices of
    samples that could not be read, with the files at fault;
  * `unreadable.txt`, those files with the reasons, one a line, if there are any.

Of the sample i of the data set there are
  * `{i}.moments` (2c, t, h, w), means and then log-variances of the clip's posterior, or `{i}.latents` (c, t, h, w),
    one draw from it; both unscaled;
  * for image-to-video `{i}.image_moments.{v}` (2c, 1, h, w), or `{i}.image_latents.{v}` (c, 1, h, w): the first frame
    encoded with the noise that the sample adds to it in epoch v;
  * `{i}.text` (tokens, features), its caption's embedding, unless an earlier sample of the shard has the same caption.

Clips start where they start in epoch 0. Nothing here imports PyTorch until a shard is opened.
"""

import copy
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cogvideox_sat.clips.batch_order import SampleKey
from cogvideox_sat.clips.options import KEPT_IN_CACHES
from cogvideox_sat.clips.reader_record import KEY, describe_reader, recorded_backend
from cogvideox_sat.configuration.merging import first_difference
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.files.training_state import anything, count, find_misfit, mapping_of, reader
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.media.video_reading import DEFAULT_BACKEND
from sgm.errors import UserError, shown
from sgm.plain_json import parse_json

logger = logging.getLogger("train_video")

FORMAT = 1
DESCRIPTION = "cache.json"
SHARDS = "rank*-*.safetensors"
STORES = ("moments", "latents")
OPEN_SHARDS = 16  # of a process that reads
NO_VARIANCE = -30.0  # the smallest log-variance of a posterior: a draw is its mean, to 3e-7
# Values of options that mean the same as others.
OTHER_NAMES = {("reshape_mode", "none"): "random", ("clips_per_video", 1): None}
REMEDY = "run tools/precompute_latents.py"


def is_cache(path: str | Path) -> bool:
    """Whether `path` is a folder made by `tools/precompute_latents.py`, finished or not."""
    return (Path(path) / DESCRIPTION).is_file()


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def describe_model(model_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What cached numbers depend on, for JSON: of the VAE and of the text encoder, sizes and a stamp of the weights.

    Weights that are not on this machine have the stamp None; training from a cache needs neither.

    Raises:
        UserError: the conditioner is not one that a cache can stand in for.
    """
    first_stage = model_config["first_stage_config"]["params"]
    encoder = first_stage["encoder_config"]["params"]
    text = text_embedder(model_config["conditioner_config"])["params"]
    modules = model_config["network_config"]["params"]["modules"]
    vae_file = first_stage.get("ckpt_path")
    return {
        "VAE": {
            **{name: encoder.get(name) for name in ("ch", "ch_mult", "num_res_blocks", "z_channels")},
            "weights": weights_stamp([Path(vae_file)]) if vae_file else None,
        },
        "text encoder": {
            "tokens": text.get("max_length", 77),
            "features": modules["patch_embed_config"]["params"].get("text_hidden_size"),
            "weights": weights_stamp(_t5_files(text.get("model_dir"))),
        },
    }


def _t5_files(model_dir: str | None) -> list[Path]:
    if not model_dir:
        return []
    folder = Path(model_dir)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return [*weights, *folder.glob("spiece.model")]


def weights_stamp(files: Sequence[Path]) -> str | None:
    """A hash of the sizes of files and of their first and last MiB; None if there are none or one is missing.

    Names do not matter, so that files may be moved. The end of a file that `torch.save` wrote holds the checksums of
    all its tensors.
    """
    digest = hashlib.blake2b(digest_size=16)
    if not files or not all(path.is_file() for path in files):
        return None
    for path in files:
        size, end = path.stat().st_size, 2**20
        digest.update(str(size).encode())
        with path.open("rb") as file:
            digest.update(file.read(end))
            file.seek(max(size - end, 0))
            digest.update(file.read(end))
    return digest.hexdigest()


def text_embedder(conditioner_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry of the text encoder among the embedders of a conditioner.

    Raises:
        UserError: it is not the only one, or it replaces dropped captions by a text.
    """
    embedders = conditioner_config["params"]["emb_models"]
    if len(embedders) != 1 or not embedders[0]["target"].endswith("FrozenT5Embedder"):
        targets = ", ".join(embedder["target"] for embedder in embedders)
        raise UserError(
            f"model.conditioner_config: a cache holds the embeddings of one FrozenT5Embedder, this has {targets}"
        )
    if embedders[0].get("legacy_ucg_value") is not None:
        raise UserError("model.conditioner_config: a cache drops captions by zeros: leave out legacy_ucg_value")
    return embedders[0]


def conditioner_for_cache(conditioner_config: Mapping[str, Any]) -> dict[str, Any]:
    """A conditioner that takes cached embeddings, `txt_embedding`, and drops them at the rate of `conditioner_config`.

    Raises:
        UserError: as `text_embedder`.
    """
    entry = copy.deepcopy(dict(text_embedder(conditioner_config)))
    entry.pop("params", None)
    entry.pop("input_keys", None)
    entry |= {"target": "sgm.modules.encoders.modules.PrecomputedEmbedder", "input_key": "txt_embedding"}
    return {**conditioner_config, "params": {**conditioner_config["params"], "emb_models": [entry]}}


# ---------------------------------------------------------------------------------------------------------------------
# The files
# ---------------------------------------------------------------------------------------------------------------------


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
    "encoding": {"image_variants": count},
    "reader?": reader,
}


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


# ---------------------------------------------------------------------------------------------------------------------
# Training data
# ---------------------------------------------------------------------------------------------------------------------


class LatentDataset:
    """The samples of one or several caches, as `data_video` gives those of clips, but encoded.

    `dataset[key]` is a dict with `moments` (2c, t, h, w), `txt_embedding` (tokens, features), both in the dtype of the
    cache, the caption `txt`, `fps`, `num_frames` (of the clip), `index`, `seed` and `unreadable` (empty); and for
    image-to-video `image_moments` (2c, 1, h, w), those of `key.epoch`, or where so many epochs were not encoded, of an
    earlier one. Samples that could not be read when the cache was made are left out.

    Args:
        paths: folders of caches.
        model_config: the `model:` section of the model to train, if the caches are to be checked against it.
        data_config: the `data:` section; what the caches were made with stands, a difference is reported.

    Raises:
        UserError: a cache is unfinished, damaged, or of another model; while reading, a shard is damaged.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        model_config: Mapping[str, Any] | None = None,
        data_config: Mapping[str, Any] | None = None,
    ):
        self.samples: list[tuple[Path, CachedSample]] = []
        self.encodings: dict[Path, dict[str, Any]] = {}
        self.counts: list[int] = []  # samples of each of the paths
        self.draws: list[float] | None = None  # see `data_video.SFTDataset`
        read: dict[Path, list[tuple[Path, CachedSample]]] = {}
        self.readers: list[dict[str, str]] = []
        for path in map(Path, paths):
            if path in read:
                self.counts.append(len(read[path]))
                self.samples += read[path]
                continue
            description, shards = read_description(path), read_shards(path)
            check_complete(path, description, shards)
            if model_config is not None:
                check_model(path, description, model_config)
            if data_config is not None:
                report_data_settings(path, description, data_config)
            self.encodings[path] = description["encoding"]
            self.readers.append(description.get(KEY) or describe_reader(recorded_backend(description)))
            found = [(shard.path, sample) for shard in shards for sample in shard.samples]
            read[path] = sorted(found, key=lambda item: item[1].index)
            self.counts.append(len(read[path]))
            self.samples += read[path]
        self.with_image = all(encoding["image_variants"] for encoding in self.encodings.values())
        if model_config is not None:
            self.with_image = model_config.get("noised_image_input", False)
            check_buckets(self, ModelLimits.from_config(model_config))
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def reader(self) -> dict[str, str]:
        """Return what decoded the videos of the caches, as runs record it; the first in order if several differ."""
        return min(self.readers, key=lambda reader: reader["video_backend"])

    @property
    def missing_labels(self) -> int:
        """Number of clips without a caption, which have the embedding of an empty one."""
        return sum(not sample.caption for _, sample in self.samples)

    @property
    def unreadable(self) -> list[str]:
        """Always empty: such clips were left out when the cache was made."""
        return []

    def bucket(self, index: int) -> Bucket:
        """Frames, height and width of the clip that was encoded, in pixels."""
        return Bucket(*self.samples[index][1].bucket)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        path, sample = self.samples[key.index]
        encoding = self.encodings[path.parent]
        item = {
            "moments": self._moments(path, f"{sample.index}.{encoding['store']}", encoding),
            "txt_embedding": self._tensor(path, f"{sample.text}.text"),
            "txt": sample.caption,
            "fps": sample.fps,
            "num_frames": sample.bucket[0],
            "index": key.index,
            "seed": key.seed,
            "unreadable": [],
        }
        if self.with_image:
            variant = key.epoch % encoding["image_variants"]
            item["image_moments"] = self._moments(path, f"{sample.index}.image_{encoding['store']}.{variant}", encoding)
        return item

    def _moments(self, path: Path, name: str, encoding: Mapping[str, Any]) -> Any:
        import torch

        stored = self._tensor(path, name)
        if encoding["store"] == "moments":
            return stored
        return torch.cat((stored, torch.full_like(stored, NO_VARIANCE)))

    def _tensor(self, path: Path, name: str) -> Any:
        if path not in self._open:
            self._open[path] = open_shard(path)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        try:
            return self._open[path].get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}): delete it and {REMEDY} again") from error

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay behind: each process that reads opens its own."""
        return {**self.__dict__, "_open": OrderedDict()}


def check_complete(folder: Path, description: Mapping[str, Any], shards: Sequence[Shard]) -> None:
    """Raises UserError unless the shards hold all samples that the description promises."""
    done, expected = len(set().union(*(shard.indices for shard in shards))), description["data"]["samples"]
    if done < expected:
        raise UserError(f"{folder} is unfinished, {done} of {expected} samples: {REMEDY} again with the same arguments")
    if not any(shard.samples for shard in shards):
        raise UserError(f"{folder} holds no samples: none could be read, see its unreadable.txt")


def check_model(folder: Path, description: Mapping[str, Any], model_config: Mapping[str, Any]) -> None:
    """Raises UserError if a cache was made with another VAE or text encoder, or lacks what the model needs."""
    for part, settings in describe_model(model_config).items():
        theirs = description["model"][part]
        # Weights that are not here cannot be compared, and are not needed.
        ours = settings if settings["weights"] else {**settings, "weights": theirs.get("weights")}
        if difference := first_difference(theirs, ours):
            name, there, here = difference
            values = "" if name == "weights" else f": {name} is {there} there and {here} here"
            raise UserError(
                f"{folder} was made with another {part} than this model's{values or ' (other weights)'}; "
                f"{REMEDY} into another folder"
            )
    if model_config.get("noised_image_input") and not description["encoding"]["image_variants"]:
        raise UserError(
            f"{folder} has no first frames, since it was made with a text-to-video model; {REMEDY} into another folder"
        )


def report_data_settings(folder: Path, description: Mapping[str, Any], data_config: Mapping[str, Any]) -> None:
    """Log how clips were read for a cache, where the configuration would have them read otherwise.

    Raises:
        UserError: the configuration asks for an option that the cache was not made with.
    """
    theirs, ours = (config.get("params") or {} for config in (description["data"]["config"], data_config))
    for name, default in KEPT_IN_CACHES.items():
        if ours.get(name) is None:
            continue
        there, here = (OTHER_NAMES.get((name, config.get(name)), config.get(name)) for config in (theirs, ours))
        there, here = (default if value is None else value for value in (there, here))
        if there != here:
            raise UserError(
                f"data.params.{name} is {here!r}, but {folder} was made with {there!r} and its clips stay as they "
                f"are: set it to that, or {REMEDY} into another folder"
            )
    theirs = {**theirs, "video_backend": recorded_backend(description)}
    ours = {"video_backend": DEFAULT_BACKEND, **ours}
    for name in sorted((theirs.keys() & ours.keys()) - KEPT_IN_CACHES.keys()):
        if theirs[name] != ours[name]:
            logger.warning(
                "%s was made with %s %s, not %s; its clips stay as they are", folder, name, theirs[name], ours[name]
            )


def check_buckets(dataset: LatentDataset, limits: ModelLimits) -> None:
    """Raises UserError if a clip has a size that the network does not take."""
    for frames, height, width in sorted({sample.bucket for _, sample in dataset.samples}):
        try:
            limits.check_training_clip(frames, height, width)
        except UserError as error:
            raise UserError(f"the latents are of clips of {frames} frames of {height}x{width}: {error}") from error
