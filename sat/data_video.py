"""The training data: videos and images with captions, as clips of a few shapes.

`data.target` in a configuration names a class of this module.

dataset = SFTDataset("data/shapes", video_size=[64, 96], fps=8, max_num_frames=17)
sample = dataset[SampleKey(index=0, seed=1)]
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

from torch.utils.data import Dataset

from cogvideox_sat.clips.attempts import CLIP_TIMEOUT, attempt
from cogvideox_sat.clips.batch_order import Locality, SampleKey
from cogvideox_sat.clips.options import check_options
from cogvideox_sat.clips.reader_record import describe_reader
from cogvideox_sat.clips.reading import WHOLE, FrameSampling, Part, read_clip
from cogvideox_sat.clips.report import SourceReport
from cogvideox_sat.clips.samples import SHOWN, check_readable, gather_samples, warn_of_mirrored_captions
from cogvideox_sat.clips.selection import SelectionRules
from cogvideox_sat.clips.sources import ClipSource, LabelRules
from cogvideox_sat.clips.transforms import Framing
from cogvideox_sat.clips.trees import included_shards
from cogvideox_sat.clips.video_sizes import nearest_size, parse_sizes
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.settings import DataSettings
from cogvideox_sat.latent_geometry import TIME_FACTOR, Bucket
from cogvideox_sat.media.video_facts import UnreadableClip, VideoFacts
from cogvideox_sat.media.video_reading import DEFAULT_BACKEND, load_decoder
from sgm.errors import UserError, printable
from sgm.util import instantiate_from_config

__all__ = ["SFTDataset", "VideoDataset", "nearest_size"]

logger = logging.getLogger(__name__)


class SFTDataset(Dataset):
    """Clips at a fixed frame rate in the shapes of a few buckets, under SAT's name.

    A sample `dataset[SampleKey(index, seed)]` is a dictionary: `mp4` uint8 (frames, 3, height, width) RGB, which
    becomes contiguous only when a batch is stacked; `txt`, the caption; `fps`, `num_frames`, `index`, `seed`; and
    `unreadable`, the clips that could not be read for this sample, each with the reason. In this case the sample is the
    next readable clip of the same bucket, cut at the place that the key's seed determines. A plain index is used as its
    own seed.

    Attributes:
        unreadable: names of clips that were left out because they could not be opened, with the reason.
        missing_labels: number of clips without a caption, which are used with an empty one.
        random_start: False cuts every clip at the first possible place.
        reports: what was found and left out, for each place in `data_dir`.
        counts: number of samples, for each place in `data_dir`.
        draws: average number of draws of each sample per epoch; None: one.

    Args:
        data_dir: folder, manifest or tar shards (see `clips.sources`), or several of them.
        video_size: (height, width), or a list of sizes: a clip gets the size nearest in aspect ratio; among equally
            near sizes, the largest one that is not larger than the source.
        fps: frame rate of the clips, whatever the rate of their sources.
        max_num_frames: largest number of frames of a clip; a shorter source gives a shorter clip.
        skip_frms_num: number of source frames that are skipped at the beginning and at the end.
        frame_multiple: clips have `frame_multiple * k + 1` frames; 8 for CogVideoX1.5.
        txt_key: key of captions in records, see `clips.caption_tables`.
        shuffle_buffer: largest distance, in samples, by which shuffling moves a clip of a tar shard.
        missing_label: treatment of a clip without a caption: "empty" uses an empty one, "stop" stops. None: an empty
            one, but stop if no clip of a place has a caption. "ignore" is for training without captions.
        max_unreadable_share: largest share of unreadable clips; above it, the data is refused.
        video_backend: decoder for videos, "pyav" or "decord"; see `media.video_reading.open_video`.
        clip_timeout: seconds for opening a clip, after which the clip counts as unreadable.
        min_frames: videos that give a shorter clip are left out. None: videos that would give a single frame are left
            out, if clips may have more frames.
        clips_per_video: largest number of samples cut out of one video, as long as they fit without overlapping; each
            starts in its own part of the video.
        clip_stride: seconds after which a video gives another sample, up to `clips_per_video` samples if given.
        caption_prefix: text before every caption, separated by a blank.
        label_lines: for label files with several lines: the "first" line is the caption, or "all" lines are.
        reshape_mode: part that a crop keeps: the "center", or a "random" part; "none" is another name for random.
        horizontal_flip: share of the samples that are mirrored.

    Raises:
        UserError: the data has no clips, too many unreadable clips or a missing label, or a size is invalid.
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
        missing_label: str | None = None,
        max_unreadable_share: float = 0.1,
        video_backend: str = DEFAULT_BACKEND,
        clip_timeout: float = CLIP_TIMEOUT,
        min_frames: int | None = None,
        clips_per_video: int | None = None,
        clip_stride: float | None = None,
        caption_prefix: str | None = None,
        label_lines: str = "first",
        reshape_mode: str = "center",
        horizontal_flip: float = 0.0,
    ):
        self.clip_timeout = clip_timeout
        self.sizes = parse_sizes(video_size)
        for name, value, least in (
            ("fps", fps, 1e-3),
            ("max_num_frames", max_num_frames, 1),
            ("skip_frms_num", skip_frms_num, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
                raise UserError(f"data: {name}: got {value!r}; expected a number, at least {least}")
        check_options(
            {
                **{"random_start": random_start, "txt_key": txt_key, "shuffle_buffer": shuffle_buffer},
                **{"missing_label": missing_label, "min_frames": min_frames, "clips_per_video": clips_per_video},
                **{"clip_stride": clip_stride, "caption_prefix": caption_prefix, "label_lines": label_lines},
                **{"reshape_mode": reshape_mode, "horizontal_flip": horizontal_flip, "max_num_frames": max_num_frames},
                "video_backend": video_backend,
            },
            prefix="data: ",
        )
        self.sampling = FrameSampling(fps, int(max_num_frames), int(skip_frms_num), frame_multiple, random_start)
        self.video_backend = video_backend
        load_decoder(video_backend)
        self.framing = Framing(reshape_mode, horizontal_flip)
        self.shuffle_buffer = shuffle_buffer
        self.caption_prefix = (caption_prefix or "").rstrip()
        rules = SelectionRules(
            self.sizes,
            LabelRules(txt_key, label_lines, used=missing_label != "ignore"),
            missing_label,
            min_frames,
            clips_per_video,
            clip_stride,
        )
        locations = list(map(str, [data_dir] if isinstance(data_dir, str | Path) else data_dir))
        samples = gather_samples(locations, rules, self.sampling, clip_timeout)
        check_readable(samples, max_unreadable_share)
        self.sources: list[ClipSource] = samples.sources
        self.infos: list[VideoFacts] = samples.infos
        self.buckets: list[Bucket] = samples.buckets
        self.unreadable: list[str] = samples.unreadable
        self.parts: dict[int, Part] = samples.parts
        self.counts: list[int] = samples.counts
        self.draws: list[float] | None = None
        self.reports: dict[str, SourceReport] = samples.reports
        self.missing_labels = samples.missing_labels if missing_label != "ignore" else 0
        if self.missing_labels:
            logger.warning(
                "%d of %d clips have no caption and are used with an empty one", self.missing_labels, len(self.sources)
            )
        if self.framing.flip:
            warn_of_mirrored_captions(self.sources)

    @classmethod
    def create_dataset_function(cls, path: str | Sequence[str], args: Any, **params: Any) -> Self:
        """Return the data set for the arguments of a run, with the signature of SAT's loaders.

        Args:
            args: `DataSettings`, or an object with some of these attributes.
        """
        settings = DataSettings.from_args(args, data_config={})
        names = ("missing_label", "max_unreadable_share", "clip_timeout")
        known = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
        if settings.model_config:
            known["frame_multiple"] = TIME_FACTOR * ModelLimits.from_config(settings.model_config).patch[0]
        target = f"{cls.__module__}.{cls.__qualname__}"
        return instantiate_from_config({"target": target, "params": params}, **{cls.LOCATION: path}, **known)

    LOCATION = "data_dir"  # name of the argument for the location of the data

    def __len__(self) -> int:
        return len(self.sources)

    def bucket(self, index: int) -> Bucket:
        """Return the bucket of a sample."""
        return self.buckets[index]

    @property
    def locality(self) -> Locality | None:
        """Return how to shuffle so that tar shards are read nearly in order.

        None: every clip is a file of its own.
        """
        if not any(source.member for source in self.sources):
            return None
        numbers: dict[str, int] = {}
        return Locality([numbers.setdefault(s.path, len(numbers)) for s in self.sources], self.shuffle_buffer)

    @property
    def reader(self) -> dict[str, str]:
        """Return the decoder of the videos, as runs and caches record it."""
        return describe_reader(self.video_backend)

    @property
    def random_start(self) -> bool:
        return self.sampling.random_start

    @random_start.setter
    def random_start(self, value: bool) -> None:
        self.sampling = replace(self.sampling, random_start=value)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for workers, without what only the main process uses."""
        return {**self.__dict__, "reports": {}, "draws": None}

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
                        self.framing.placement(key.seed),
                        self.parts.get(index, WHOLE),
                        self.infos[index],
                        self.video_backend,
                    )
            except UnreadableClip as problem:
                unreadable.append(printable(f"{source.name}: {problem}"))
                continue
            return {
                "mp4": frames,
                "txt": f"{self.caption_prefix} {source.caption or ''}".strip(),
                "fps": float(self.sampling.fps),
                "num_frames": len(frames),
                "index": key.index,
                "seed": key.seed,
                "unreadable": unreadable,
            }
        raise UserError(f"no clip of {self.buckets[key.index]} can be read any more: {'; '.join(unreadable[:SHOWN])}")

    def _same_bucket(self, index: int) -> Iterator[int]:
        """Yield the indices of the same bucket, starting at `index`, one for each source."""
        tried = set()
        for other in chain(range(index, len(self)), range(index)):
            if self.buckets[other] == self.buckets[index] and self.sources[other] not in tried:
                tried.add(self.sources[other])
                yield other


class VideoDataset(SFTDataset):
    """`SFTDataset` with the argument names of SAT's configurations for webdataset tar shards.

    Args:
        path: tar shards, or anything else that `SFTDataset` takes.
        image_size: another name for `video_size`.
        num_frames: another name for `max_num_frames`.
        nshards, seed, meta_names: have no effect. All shards are read, in an order that follows from the seed of the
            run, and captions are found in the shards and in their `.meta.jsonl` files.
        include_dirs: folders, separated by commas, whose tar files (including those in subfolders) are read too;
            `FOLDER*2` reads them twice.
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
        nshards: int | None = None,
        seed: int | None = None,
        meta_names: Sequence[str] | None = None,
        shuffle_buffer: int = 1000,
        include_dirs: str | None = None,
        txt_key: str = "caption",
        *,
        max_num_frames: int | None = None,
        video_size: Sequence[int] | Sequence[Sequence[int]] | None = None,
        **others: Any,
    ):
        if (image_size is None) == (video_size is None):
            raise UserError("data: give either image_size or video_size, [height, width] in pixels")
        if unknown := others.keys() - (SFTDataset.__init__.__kwdefaults__ or {}).keys():
            raise UserError(f"data: {', '.join(sorted(unknown))}: VideoDataset has no such params")
        ignored = {"nshards": nshards, "seed": seed, "meta_names": meta_names}
        if given := [name for name, value in ignored.items() if value is not None]:
            logger.info(
                "data: %s have no effect: all shards are read, in the order of the run's seed", ", ".join(given)
            )
        places = [str(place) for place in ([path] if isinstance(path, str | Path) else path) if str(place)]
        frames = next((count for count in (num_frames, max_num_frames) if count is not None), 49)
        super().__init__(
            [*places, *included_shards(include_dirs)],
            video_size or image_size or [],
            fps,
            frames,
            skip_frms_num,
            shuffle_buffer=shuffle_buffer,
            txt_key=txt_key,
            **others,
        )
