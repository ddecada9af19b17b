"""The training data: videos and images with captions, as clips of a few shapes. `data.target` names a class here.

dataset = SFTDataset("data/shapes", video_size=[64, 96], fps=8, max_num_frames=17)
sample = dataset[SampleKey(index=0, seed=1)]
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

from torch.utils.data import Dataset

from batch_order import Bucket, Locality, SampleKey
from clip_attempts import CLIP_TIMEOUT, attempt
from clip_probing import probe_clips
from clip_reading import FrameSampling, read_clip
from clip_sources import ClipSource, find_clips
from model_limits import SPACE_FACTOR, TIME_FACTOR, ModelLimits
from sgm.errors import UserError
from sgm.util import get_obj_from_str, instantiate_from_config
from video_reading import BACKENDS, DEFAULT_BACKEND, UnreadableClip

logger = logging.getLogger("train_video")

SAME_RATIO = 0.02  # aspect ratios whose logarithms differ by less are the same: sizes are rounded to multiples of 16
SHOWN = 5  # unreadable clips named on the terminal; the dataset has the list of all


class SFTDataset(Dataset):
    """Clips at a fixed rate in the shapes of a few buckets, in SAT's name for them.

    A sample `dataset[SampleKey(index, seed)]` is a dictionary: `mp4` uint8 (frames, 3, height, width) RGB, which is
    made contiguous only when a batch is stacked; `txt` the caption; `fps`, `num_frames`, `index`, `seed`; and
    `unreadable`, the clips found bad while it was read, each with the reason. The sample then is the next readable clip
    of the same bucket, cut at the place that the key's seed says. A plain index stands for its key with that seed.

    Attributes:
        unreadable: names of the clips that were left out because they could not be opened, with the reason.
        missing_labels: number of clips that have no caption, and are used with an empty one.
        random_start: False cuts every clip at the first possible place.

    Args:
        data_dir: folder, manifest or tar shards, see `clip_sources`; or several of them.
        video_size: (height, width), or a list of them: a clip goes to the size nearest to it in aspect ratio, and among
            equals to the largest that is not larger than the source.
        fps: of the clips, whatever the rate of their sources.
        max_num_frames: of a clip; a shorter source gives a shorter clip.
        skip_frms_num: source frames at the beginning and the end that are not used.
        frame_multiple: clips have `frame_multiple * k + 1` frames; 8 for CogVideoX1.5.
        txt_key: of captions in tar shards, see `clip_sources.find_clips`.
        shuffle_buffer: how far, in samples, a clip in a tar shard moves at most when it is shuffled.
        missing_label: what to do about a clip without caption: use an "empty" one, or "stop"; "ignore" is for training
            that uses no captions.
        max_unreadable_share: of the clips, above which the data is refused.
        video_backend: what decodes videos, "pyav" or "decord"; see `video_reading.open_video`.
        clip_timeout: seconds to look at a clip, after which it is unreadable.

    Raises:
        UserError: no clips, too many unreadable ones, a missing label, a size that is none.
    """

    def __init__(
        self,
        data_dir: str | Sequence[str],
        video_size: Sequence[int] | Sequence[Sequence[int]],
        fps: float,
        max_num_frames: int,
        skip_frms_num: float = 3,
        *,
        random_start: bool = True,
        frame_multiple: int = TIME_FACTOR,
        txt_key: str = "caption",
        shuffle_buffer: int = 1000,
        missing_label: str = "empty",
        max_unreadable_share: float = 0.1,
        video_backend: str = DEFAULT_BACKEND,
        clip_timeout: float = CLIP_TIMEOUT,
    ):
        self.clip_timeout = clip_timeout
        self.sizes = _sizes(video_size)
        for name, value, least in (
            ("fps", fps, 1e-3),
            ("max_num_frames", max_num_frames, 1),
            ("skip_frms_num", skip_frms_num, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
                raise UserError(f"data: {name} is {value!r}; expected a number, at least {least}")
        self.sampling = FrameSampling(fps, int(max_num_frames), int(skip_frms_num), frame_multiple, random_start)
        if video_backend not in BACKENDS:
            raise UserError(f"data: video_backend is {video_backend!r}; use one of {', '.join(BACKENDS)}")
        self.video_backend = video_backend
        self.shuffle_buffer = shuffle_buffer
        self.sources, self.infos, self.buckets, self.unreadable = [], [], [], []
        for location in [data_dir] if isinstance(data_dir, str | Path) else data_dir:
            self._add(str(location), txt_key)
        _check_readable(len(self.sources), self.unreadable, max_unreadable_share)
        self.missing_labels = _count_missing(self.sources, missing_label)

    def _add(self, location: str, txt_key: str) -> None:
        sources = find_clips(location, txt_key)
        folder = Path(location) if Path(location).is_dir() else Path(location).parent
        infos, problems = probe_clips(sources, folder, self.clip_timeout)
        self.unreadable += problems
        for source, info in zip(sources, infos, strict=True):
            if info:
                size = nearest_size(info.height, info.width, self.sizes)
                self.sources.append(source)
                self.infos.append(info)
                self.buckets.append(Bucket(self.sampling.num_frames(info), *size))

    @classmethod
    def create_dataset_function(cls, path: str | Sequence[str], args: Any, **params: Any) -> Self:
        """The dataset for the arguments of a run, in the form in which SAT's loaders ask for it.

        Args:
            args: `TrainingArguments`, or anything with some of the attributes used here.
        """
        settings = {
            name: getattr(args, name)
            for name in ("missing_label", "max_unreadable_share", "clip_timeout")
            if hasattr(args, name)
        }
        if model_config := getattr(args, "model_config", None):
            settings["frame_multiple"] = TIME_FACTOR * ModelLimits.from_config(model_config).patch[0]
        target = f"{cls.__module__}.{cls.__qualname__}"
        return instantiate_from_config({"target": target, "params": params}, **{cls.LOCATION: path}, **settings)

    LOCATION = "data_dir"  # the argument that says where the data is

    def __len__(self) -> int:
        return len(self.sources)

    def bucket(self, index: int) -> Bucket:
        return self.buckets[index]

    @property
    def locality(self) -> Locality | None:
        """How to shuffle so that tar shards are read nearly in order; None where every clip is a file of its own."""
        if not any(source.member for source in self.sources):
            return None
        numbers: dict[str, int] = {}
        return Locality([numbers.setdefault(s.path, len(numbers)) for s in self.sources], self.shuffle_buffer)

    @property
    def random_start(self) -> bool:
        return self.sampling.random_start

    @random_start.setter
    def random_start(self, value: bool) -> None:
        self.sampling = replace(self.sampling, random_start=value)

    def __getitem__(self, key: SampleKey | int) -> dict[str, Any]:
        key = SampleKey(key, seed=key) if isinstance(key, int) else key
        unreadable = []
        for index in self._same_bucket(key.index):
            source = self.sources[index]
            try:
                with attempt(source.name):
                    frames = read_clip(
                        source,
                        self.buckets[index],
                        self.sampling,
                        key.seed,
                        info=self.infos[index],
                        backend=self.video_backend,
                    )
            except UnreadableClip as problem:
                unreadable.append(f"{source.name}: {problem}")
                continue
            return {
                "mp4": frames,
                "txt": source.caption or "",
                "fps": float(self.sampling.fps),
                "num_frames": len(frames),
                "index": key.index,
                "seed": key.seed,
                "unreadable": unreadable,
            }
        raise UserError(f"no clip of {self.buckets[key.index]} can be read any more: {'; '.join(unreadable[:SHOWN])}")

    def _same_bucket(self, index: int) -> Iterator[int]:
        """The indices of the bucket of `index`, from it on and around."""
        for other in chain(range(index, len(self)), range(index)):
            if self.buckets[other] == self.buckets[index]:
                yield other


class VideoDataset(SFTDataset):
    """`SFTDataset` with the argument names that SAT's configurations use for webdataset tar shards.

    Args:
        path: tar shards, or anything else that `SFTDataset` takes.
        image_size: another name of `video_size`.
        num_frames: another name of `max_num_frames`.
        others: the keyword arguments of `SFTDataset`.
    """

    LOCATION = "path"

    def __init__(
        self,
        path: str | Sequence[str],
        image_size: Sequence[int] | None = None,
        num_frames: int | None = None,
        fps: float = 8,
        skip_frms_num: float = 0,
        *,
        max_num_frames: int | None = None,
        video_size: Sequence[int] | Sequence[Sequence[int]] | None = None,
        **others: Any,
    ):
        if (image_size is None) == (video_size is None):
            raise UserError("data: give either image_size or video_size, [height, width] in pixels")
        if unknown := others.keys() - SFTDataset.__init__.__kwdefaults__.keys():
            raise UserError(f"data: {', '.join(sorted(unknown))}: VideoDataset has no such params")
        frames = next((count for count in (num_frames, max_num_frames) if count is not None), 49)
        super().__init__(path, video_size or image_size, fps, frames, skip_frms_num, **others)


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size for a source: nearest in aspect ratio, then the largest that need not be enlarged, else the smallest."""
    distances = [abs(math.log(width * h / (height * w))) for h, w in sizes]
    nearest = [size for size, far in zip(sizes, distances, strict=True) if far <= min(distances) + SAME_RATIO]
    covered = [size for size in nearest if size[0] * size[1] <= height * width]
    return max(covered, key=math.prod) if covered else min(nearest, key=math.prod)


def _sizes(video_size: Any) -> list[tuple[int, int]]:
    several = isinstance(video_size, Sequence) and video_size and all(isinstance(size, Sequence) for size in video_size)
    sizes = video_size if several else [video_size]
    for size in sizes:
        sides = size if isinstance(size, Sequence) else ()
        if len(sides) != 2 or not all(type(side) is int and side > 0 and side % SPACE_FACTOR == 0 for side in sides):
            raise UserError(
                f"data: video_size is {video_size}; expected [height, width] or a list of such, in multiples of "
                f"{SPACE_FACTOR} pixels"
            )
    return [tuple(size) for size in sizes]


def _check_readable(readable: int, unreadable: Sequence[str], max_share: float) -> None:
    total = readable + len(unreadable)
    for line in unreadable[:SHOWN]:
        logger.warning("left out, unreadable: %s", line)
    if not readable or len(unreadable) > max_share * total:
        raise UserError(
            f"{len(unreadable)} of {total} clips are unreadable, more than max_unreadable_share {max_share:g} allows; "
            f"the first: {unreadable[0]}"
        )
    if len(unreadable) > SHOWN:
        logger.warning("left out, unreadable: %d clips in all", len(unreadable))


def _count_missing(sources: Sequence[ClipSource], missing_label: str) -> int:
    missing = [source for source in sources if source.caption is None]
    if missing and missing_label == "stop":
        raise UserError(
            f"{len(missing)} of {len(sources)} clips have no caption, the first is {missing[0].name}; write labels, or "
            "set missing_label: empty to train with empty captions"
        )
    if missing and missing_label != "ignore":
        logger.warning("%d of %d clips have no caption and are used with an empty one", len(missing), len(sources))
    return len(missing)


# ---------------------------------------------------------------------------------------------------------------------
# For a run
# ---------------------------------------------------------------------------------------------------------------------


def make_dataset(paths: Sequence[str], data_config: Mapping[str, Any], args: Any, random_start: bool = True) -> Dataset:
    """The dataset of a run: of the class that `data_config` names, or what `tools/precompute_latents.py` made of one.

    Args:
        paths: where the data is; all of the same kind.
        data_config: the `data:` section, `target` and `params`.
        args: `TrainingArguments`.
        random_start: False cuts clips always at the same place, for validation.

    Raises:
        UserError: the data or its settings do not fit; see the classes.
    """
    from latent_cache import LatentDataset, is_cache

    cached = [path for path in paths if is_cache(path)]
    if cached:
        if len(cached) < len(paths):
            raise UserError(
                f"{cached[0]} holds precomputed latents and other data does not: train on one kind at a time"
            )
        return LatentDataset(paths, args.model_config, data_config)
    if "target" not in data_config:
        raise UserError("data: target is missing; name the class of the dataset, data_video.SFTDataset for instance")
    create = getattr(get_obj_from_str(data_config["target"]), "create_dataset_function", None)
    if create is None:
        raise UserError(f"data: {data_config['target']} is no class of datasets; use data_video.SFTDataset")
    dataset = create(list(paths), args, **(data_config.get("params") or {}))
    if not random_start:
        dataset.random_start = False
    return dataset
