"""Choose the samples of a place: its usable files, their shapes, and the clips in them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from cogvideox_sat.clips.probing import probe_clips
from cogvideox_sat.clips.reading import WHOLE, FrameSampling, Part
from cogvideox_sat.clips.report import SourceReport
from cogvideox_sat.clips.sources import READERS, ClipSource, Found, LabelRules, search
from cogvideox_sat.clips.video_sizes import nearest_size
from cogvideox_sat.configuration.frame_sizes import share_cut_away
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.media.video_facts import VideoFacts
from sgm.errors import UserError

TOO_SHORT = "videos are shorter than"  # the beginning of the reason to leave out short videos


class UnusablePlace(UserError):
    """Raised if a place has no clips or cannot be parsed; the caller adds the argument's name."""


@dataclass(frozen=True)
class SelectionRules:
    """Rules that decide which clips become samples.

    Attributes:
        sizes: (height, width) of the buckets.
        labels: rules for reading captions.
        missing_label: see `clips.options.MISSING_LABELS`.
        min_frames: least frames of a clip; None: a video is never used as a single frame, if clips may be longer.
        clips_per_video, clip_stride: see `FrameSampling.parts`.
    """

    sizes: Sequence[tuple[int, int]]
    labels: LabelRules
    missing_label: str | None = None
    min_frames: int | None = None
    clips_per_video: int | None = None
    clip_stride: float | None = None


@dataclass
class Selection:
    """Samples of a place, and clips that could not be opened.

    Attributes:
        sources, infos, buckets, parts: one entry per sample.
        unreadable: a line for each unreadable clip.
    """

    report: SourceReport
    sources: list[ClipSource] = field(default_factory=list)
    infos: list[VideoFacts] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def select(location: str, rules: SelectionRules, sampling: FrameSampling, clip_timeout: float) -> Selection:
    """Return the samples of a place.

    Args:
        clip_timeout: seconds for probing a clip; one that takes longer is unreadable.

    Raises:
        UnusablePlace: the place has no clips, or a file cannot be parsed.
        UserError: captions are missing that are required.
    """
    try:
        found = search(location, rules.labels)
    except UserError as error:
        raise UnusablePlace(str(error)) from error
    report = SourceReport(
        location,
        long_labels=found.long_labels,
        label_lines=rules.labels.lines,
        unread=dict(found.unread),
        hints=found.hints,
        captions_missing=0 if rules.labels.used else None,
    )
    for name in found.unlisted:
        report.leave_out("clips have no caption, neither their own nor in the list above them", name)
    for name in found.beside:
        report.leave_out("clips lie beside tar files, which alone are read", name)
    clips = _without_stray_pictures(found.clips, rules.missing_label, report)
    check_captions(location, clips, found, rules.missing_label)
    place = Path(location)
    folder = place if place.is_dir() else place.parent
    infos, problems = probe_clips([clip for clip, _ in clips], folder, clip_timeout)
    selection = Selection(report, unreadable=problems)
    least = least_frames(sampling, rules.min_frames)
    for (clip, is_image), info in zip(clips, infos, strict=True):
        if info is None:
            continue
        frames, size = sampling.num_frames(info), nearest_size(info.height, info.width, rules.sizes)
        if not is_image and frames < least:
            report.leave_out(_too_short(sampling, least), clip.name)
            continue
        parts = [WHOLE] if is_image else sampling.parts(info, frames, rules.clips_per_video, rules.clip_stride)
        bucket = Bucket(frames, *size)
        selection.sources += [clip] * len(parts)
        selection.infos += [info] * len(parts)
        selection.buckets += [bucket] * len(parts)
        selection.parts += parts
        report.samples += len(parts)
        report.shapes[str(bucket)] += len(parts)
        report.cut_away.append(share_cut_away((info.height, info.width), size))
        if report.captions_missing is not None:
            report.captions_missing += clip.caption is None
        if is_image:
            report.pictures += 1
        else:
            report.videos += 1
            report.seconds.append(info.seconds + info.frame_duration)
    return selection


def _without_stray_pictures(
    clips: Sequence[ClipSource], missing_label: str | None, report: SourceReport
) -> list[tuple[ClipSource, bool]]:
    """Return the clips that count, and for each whether it is an image.

    Images beside videos are often first frames, masks or previews, so they count only if they have a caption. Training
    that uses no captions takes all images.
    """
    with ThreadPoolExecutor(READERS) as threads:
        kinds = [(clip, clip.is_image) for clip in threads.map(ClipSource.with_known_kind, clips)]
    if missing_label == "ignore" or all(is_image for _, is_image in kinds):
        return kinds
    chosen = []
    for clip, is_image in kinds:
        if is_image and clip.caption is None:
            report.leave_out("pictures beside videos have no caption of their own", clip.name)
        else:
            chosen.append((clip, is_image))
    return chosen


def check_captions(
    location: str, clips: Sequence[tuple[ClipSource, bool]], found: Found, missing_label: str | None
) -> None:
    """Check that the clips of a place have the captions that are required.

    Raises:
        UserError: a clip has no caption and `missing_label` is "stop", or no clip has one and `missing_label` is None.
    """
    missing = [clip for clip, _ in clips if clip.caption is None]
    if missing and missing_label == "stop":
        raise UserError(
            f"{len(missing)} of {len(clips)} clips have no caption, the first is {missing[0].name}; write labels, or "
            "set missing_label: empty to train with empty captions"
        )
    if clips and len(missing) == len(clips) and missing_label is None:
        hints = "".join(f"; {hint}" for hint in found.hints[:3])
        raise UserError(
            f"{location}: none of {len(clips)} clips has a caption; looked for {found.looked_for}{hints}; write "
            "captions, or set missing_label: empty to train with empty ones"
        )


def least_frames(sampling: FrameSampling, min_frames: int | None) -> int:
    """Return the smallest number of frames of a video's clip."""
    longest = sampling.max_frames - (sampling.max_frames - 1) % sampling.multiple
    return min(sampling.multiple + 1, longest) if min_frames is None else min_frames


def _too_short(sampling: FrameSampling, least: int) -> str:
    kept = f" without {sampling.skip_frames} frames at each end" if sampling.skip_frames else ""
    return f"{TOO_SHORT} {(least - 1) / sampling.fps:.3g} s{kept} (clips have {least} frames at least)"
