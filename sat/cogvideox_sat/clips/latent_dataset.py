"""Read training data from caches of latents, and check them against the model and the run."""

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cogvideox_sat.clips.batch_order import SampleKey
from cogvideox_sat.clips.latent_cache import REMEDY, CachedSample, Shard, open_shard, read_description, read_shards
from cogvideox_sat.clips.latent_identity import describe_model
from cogvideox_sat.clips.options import KEPT_IN_CACHES
from cogvideox_sat.clips.reader_record import KEY, describe_reader, recorded_backend
from cogvideox_sat.configuration.merging import first_difference
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.model_section import conditions_on_key_frames
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.media.video_reading import DEFAULT_BACKEND
from sgm.errors import UserError

logger = logging.getLogger(__name__)

OPEN_SHARDS = 16  # open files of a reading process
NO_VARIANCE = -30.0  # smallest log-variance of a posterior; a draw differs from the mean by 3e-7
# Values of options that mean the same as other values.
OTHER_NAMES = {("reshape_mode", "none"): "random", ("clips_per_video", 1): None}


class LatentDataset:
    """Samples of one or several caches, as `data_video` gives those of clips, but encoded.

    `dataset[key]` is a dict with `moments` (2c, t, h, w), `txt_embedding` (tokens, features), both in the dtype of the
    cache, the caption `txt`, `fps`, `num_frames` (of the clip), `index`, `seed` and `unreadable` (empty). For
    image-to-video it also has `image_moments` (2c, 1, h, w), and `key_moments` (2c, t - 1, h, w) if the model's
    `conditioning` has other frames than the first. These are those of `key.epoch`, or of an earlier epoch if fewer
    epochs were encoded. Samples that were unreadable when the cache was made are left out.

    Args:
        paths: folders of caches.
        model_config: the `model:` section of the model to train, to check the caches against it.
        data_config: the `data:` section; the settings of the caches are used, and differences are reported.

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
        self.with_key_frames = all(encoding.get("key_frames") for encoding in self.encodings.values())
        if model_config is not None:
            self.with_image = model_config.get("noised_image_input", False)
            self.with_key_frames = conditions_on_key_frames(model_config)
            check_buckets(self, ModelLimits.from_config(model_config))
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def reader(self) -> dict[str, str]:
        """Return the reader of the caches' videos, as runs record it; the first if several differ."""
        return min(self.readers, key=lambda reader: reader["video_backend"])

    @property
    def missing_labels(self) -> int:
        """Return the number of clips without a caption, which have the embedding of an empty one."""
        return sum(not sample.caption for _, sample in self.samples)

    @property
    def unreadable(self) -> list[str]:
        """Return an empty list: unreadable clips were left out when the cache was made."""
        return []

    def bucket(self, index: int) -> Bucket:
        """Return frames, height and width of the clip that was encoded, in pixels."""
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
            names = {"image_moments": "image", **({"key_moments": "key"} if self.with_key_frames else {})}
            item |= {
                entry: self._moments(path, f"{sample.index}.{name}_{encoding['store']}.{variant}", encoding)
                for entry, name in names.items()
            }
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
            raise UserError(f"{path} is damaged ({error}); delete it and {REMEDY} again") from error

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without open files, since each reading process opens its own."""
        return {**self.__dict__, "_open": OrderedDict()}


def check_complete(folder: Path, description: Mapping[str, Any], shards: Sequence[Shard]) -> None:
    """Check that the shards hold all samples of the description, else raise UserError."""
    done, expected = len(set().union(*(shard.indices for shard in shards))), description["data"]["samples"]
    if done < expected:
        raise UserError(f"{folder} is unfinished, {done} of {expected} samples; {REMEDY} again with the same arguments")
    if not any(shard.samples for shard in shards):
        raise UserError(f"{folder} holds no samples, since none could be read; see its unreadable.txt")


def check_model(folder: Path, description: Mapping[str, Any], model_config: Mapping[str, Any]) -> None:
    """Check that a cache was made with the model's VAE and text encoder and has all it needs.

    Raises:
        UserError: it was not, or lacks something.
    """
    for part, settings in describe_model(model_config).items():
        theirs = description["model"][part]
        # Weights that are not on this machine cannot be compared, and are not needed.
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
    if conditions_on_key_frames(model_config) and not description["encoding"].get("key_frames"):
        raise UserError(f"{folder} has no key frames, which model.conditioning needs; {REMEDY} into another folder")


def report_data_settings(folder: Path, description: Mapping[str, Any], data_config: Mapping[str, Any]) -> None:
    """Log settings with which a cache was made and that differ from the configuration.

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
                f"data.params.{name} is {here!r}, but {folder} was made with {there!r}; set it to that, or {REMEDY} "
                "into another folder"
            )
    theirs = {**theirs, "video_backend": recorded_backend(description)}
    ours = {"video_backend": DEFAULT_BACKEND, **ours}
    for name in sorted((theirs.keys() & ours.keys()) - KEPT_IN_CACHES.keys()):
        if theirs[name] != ours[name]:
            logger.warning(
                "%s was made with %s %s, not %s; its clips are not changed", folder, name, theirs[name], ours[name]
            )


def check_buckets(dataset: LatentDataset, limits: ModelLimits) -> None:
    """Check that the network takes the sizes of all clips, else raise UserError."""
    for frames, height, width in sorted({sample.bucket for _, sample in dataset.samples}):
        try:
            limits.check_training_clip(frames, height, width)
        except UserError as error:
            raise UserError(f"the latents are of clips of {frames} frames of {height}x{width}: {error}") from error
