"""The training data: videos and images with captions, as clips of a few shapes. `data.target` names a class here.

dataset = SFTDataset("data/shapes", video_size=[64, 96], fps=8, max_num_frames=17)
sample = dataset[SampleKey(index=0, seed=1)]
"""

import logging
import re
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
from cogvideox_sat.clips.reading import WHOLE, ClipInfo, FrameSampling, Part, read_clip
from cogvideox_sat.clips.report import SourceReport, counted
from cogvideox_sat.clips.selection import Selection, SelectionRules, select
from cogvideox_sat.clips.sources import ClipSource, LabelRules
from cogvideox_sat.clips.transforms import Framing
from cogvideox_sat.clips.video_sizes import nearest_size, parse_sizes
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.settings import DataSettings
from cogvideox_sat.latent_geometry import TIME_FACTOR, Bucket
from cogvideox_sat.media.video_facts import UnreadableClip
from cogvideox_sat.media.video_reading import DEFAULT_BACKEND, load_decoder
from sgm.errors import UserError, printable
from sgm.util import instantiate_from_config

__all__ = ["SFTDataset", "VideoDataset", "nearest_size"]

logger = logging.getLogger(__name__)

SIDES = re.compile(r"\b(left|right)(ward|wards|most)?\b", re.IGNORECASE)
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
        reports: what there is at each place, and what was left out.
        counts: samples of each of the places in `data_dir`.
        draws: how often each sample is drawn in an epoch, on average; None: once.

    Args:
        data_dir: folder, manifest or tar shards, see `clips.sources`; or several of them.
        video_size: (height, width), or a list of them: a clip goes to the size nearest to it in aspect ratio, and among
            equals to the largest that is not larger than the source.
        fps: of the clips, whatever the rate of their sources.
        max_num_frames: of a clip; a shorter source gives a shorter clip.
        skip_frms_num: source frames at the beginning and the end that are not used.
        frame_multiple: clips have `frame_multiple * k + 1` frames; 8 for CogVideoX1.5.
        txt_key: of captions in records, see `clips.caption_tables`.
        shuffle_buffer: how far, in samples, a clip in a tar shard moves at most when it is shuffled.
        missing_label: what to do about a clip without caption: use an "empty" one, or "stop". None: an empty one, but
            stop if no clip of a place has a caption. "ignore" is for training that uses no captions.
        max_unreadable_share: of the clips, above which the data is refused.
        video_backend: what decodes videos, "pyav" or "decord"; see `media.video_reading.open_video`.
        clip_timeout: seconds to look at a clip, after which it is unreadable.
        min_frames: videos that give a shorter clip are left out. None: those that would give a single frame, as long as
            clips may have more.
        clips_per_video: samples that are cut out of one video at most, if so many fit in without overlapping; each
            starts in a part of its own.
        clip_stride: seconds after which a video gives another sample; with `clips_per_video` at most so many.
        caption_prefix: put before every caption, with a blank between.
        label_lines: of a label file of several lines the "first" is the caption, or "all" of them.
        reshape_mode: what a crop keeps: the "center", or a "random" part; "none" is another name of that.
        horizontal_flip: the share of the samples that are mirrored.

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
                raise UserError(f"data: {name} is {value!r}; expected a number, at least {least}")
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
        self.sources: list[ClipSource] = []
        self.infos: list[ClipInfo] = []
        self.buckets: list[Bucket] = []
        self.unreadable: list[str] = []
        self.parts: dict[int, Part] = {}  # of the samples that do not start anywhere in their source
        self.counts: list[int] = []
        self.draws: list[float] | None = None
        self.reports: dict[str, SourceReport] = {}
        self._add(list(map(str, [data_dir] if isinstance(data_dir, str | Path) else data_dir)), rules)
        _check_readable(len(self.sources), self.unreadable, max_unreadable_share)
        captions_used = missing_label != "ignore"
        self.missing_labels = sum(source.caption is None for source in self.sources) if captions_used else 0
        if self.missing_labels:
            logger.warning(
                "%d of %d clips have no caption and are used with an empty one", self.missing_labels, len(self.sources)
            )
        self._warn_of_mirrored_captions()

    def _add(self, locations: Sequence[str], rules: SelectionRules) -> None:
        """Add the samples of places; one that is named several times is looked at once."""
        selections: dict[str, Selection] = {}
        for location in locations:
            if location in selections:
                selections[location].report.repeat += 1
            else:
                selections[location] = select(location, rules, self.sampling, self.clip_timeout)
                for level, line in selections[location].report.lines():
                    logger.log(level, "%s", line)
            selection = selections[location]
            parts = {len(self.sources) + i: part for i, part in enumerate(selection.parts) if part != WHOLE}
            self.parts.update(parts)
            self.sources += selection.sources
            self.infos += selection.infos
            self.buckets += selection.buckets
            self.unreadable += selection.unreadable
            self.counts.append(len(selection.sources))
        self.reports = {location: selection.report for location, selection in selections.items()}
        if empty := [location for location, selection in selections.items() if not selection.sources]:
            reasons = [counted(left.count, reason) for reason, left in self.reports[empty[0]].left_out.items()]
            if reasons and not selections[empty[0]].unreadable:
                raise UserError(f"{empty[0]}: no clip is left: {'; '.join(reasons)}")

    def _warn_of_mirrored_captions(self) -> None:
        if self.framing.flip:
            sided = sum(bool(SIDES.search(source.caption or "")) for source in self.sources)
            if sided:
                said = counted(sided, "captions say")
                logger.warning("%s left or right, and horizontal_flip mirrors such clips too: set it to 0", said)

    @classmethod
    def create_dataset_function(cls, path: str | Sequence[str], args: Any, **params: Any) -> Self:
        """The dataset for the arguments of a run, in the form in which SAT's loaders ask for it.

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
    def reader(self) -> dict[str, str]:
        """Return what decodes the videos, as runs and caches record it."""
        return describe_reader(self.video_backend)

    @property
    def random_start(self) -> bool:
        return self.sampling.random_start

    @random_start.setter
    def random_start(self, value: bool) -> None:
        self.sampling = replace(self.sampling, random_start=value)

    def __getstate__(self) -> dict[str, Any]:
        """Leave what only the main process tells out of what workers get."""
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
        """Yield the indices in the bucket of `index`, from `index` on and around, one for each source."""
        tried = set()
        for other in chain(range(index, len(self)), range(index)):
            if self.buckets[other] == self.buckets[index] and self.sources[other] not in tried:
                tried.add(self.sources[other])
                yield other


class VideoDataset(SFTDataset):
    """`SFTDataset` with the argument names that SAT's configurations use for webdataset tar shards.

    Args:
        path: tar shards, or anything else that `SFTDataset` takes.
        image_size: another name of `video_size`.
        num_frames: another name of `max_num_frames`.
        nshards, seed, meta_names: have no effect. All shards are read, in an order that follows from the seed of the
            run, and captions are found in whatever the shards and their `.meta.jsonl` files hold.
        include_dirs: folders, with commas between, whose tar files (also those in folders below) are read too;
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
            [*places, *_included(include_dirs)],
            video_size or image_size or [],
            fps,
            frames,
            skip_frms_num,
            shuffle_buffer=shuffle_buffer,
            txt_key=txt_key,
            **others,
        )


def _included(include_dirs: str | None) -> list[str]:
    """Return the tar files below the folders of `VideoDataset`'s argument, in a fixed order."""
    if include_dirs is None:
        return []
    if not isinstance(include_dirs, str):
        raise UserError(f"data: include_dirs is {include_dirs!r}; expected folders with commas between")
    shards = []
    for part in include_dirs.split(","):
        folder, _, times = part.strip().partition("*")
        if times and not times.isdecimal():
            raise UserError(f"data: include_dirs has '{part}'; write FOLDER*2 to read the shards of FOLDER twice")
        found = sorted(str(shard) for shard in Path(folder).rglob("*.tar") if shard.stat().st_size)
        if not found:
            raise UserError(f"data: include_dirs: {folder} holds no .tar file; name a folder of shards")
        shards += found * int(times or 1)
    return shards


def _check_readable(readable: int, unreadable: Sequence[str], max_share: float) -> None:
    total = readable + len(unreadable)
    if not total:
        raise UserError("data: there are no clips: name a folder, a manifest or tar shards")
    for line in unreadable[:SHOWN]:
        logger.warning("left out, unreadable: %s", line)
    if unreadable and (not readable or len(unreadable) > max_share * total):
        raise UserError(
            f"{len(unreadable)} of {total} clips are unreadable, more than max_unreadable_share {max_share:g} allows; "
            f"the first: {unreadable[0]}"
        )
    if len(unreadable) > SHOWN:
        logger.warning("left out, unreadable: %d clips in all", len(unreadable))
