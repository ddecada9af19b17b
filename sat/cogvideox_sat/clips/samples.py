"""Gather the samples of all places of a data set, and report what is left out."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from cogvideox_sat.clips.reading import WHOLE, FrameSampling, Part
from cogvideox_sat.clips.report import SourceReport, counted
from cogvideox_sat.clips.selection import TOO_SHORT, Selection, SelectionRules, select
from cogvideox_sat.clips.sources import ClipSource
from cogvideox_sat.latent_geometry import Bucket
from cogvideox_sat.media.video_facts import VideoFacts
from sgm.errors import UserError

logger = logging.getLogger(__name__)

SIDES = re.compile(r"\b(left|right)(ward|wards|most)?\b", re.IGNORECASE)
ADVICE_FOR_SHORT = "; give longer videos, lower skip_frms_num, or set min_frames: 1 to train them as pictures"
SHOWN = 5  # number of unreadable clips that the log names; the data set lists all of them


@dataclass
class Samples:
    """Samples of several places, in the order of the places.

    Attributes:
        sources, infos, buckets: one entry per sample.
        parts: by sample, for those that may start only in a part of their source.
        counts: number of samples of each place.
        unreadable: a line for each clip that could not be opened.
        reports: what was found and left out, by place.
    """

    sources: list[ClipSource] = field(default_factory=list)
    infos: list[VideoFacts] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    parts: dict[int, Part] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    reports: dict[str, SourceReport] = field(default_factory=dict)

    @property
    def missing_labels(self) -> int:
        """Return the number of samples without a caption."""
        return sum(source.caption is None for source in self.sources)

    def add(self, selection: Selection) -> None:
        """Add the samples of a place."""
        first = len(self.sources)
        self.parts |= {first + i: part for i, part in enumerate(selection.parts) if part != WHOLE}
        self.sources += selection.sources
        self.infos += selection.infos
        self.buckets += selection.buckets
        self.unreadable += selection.unreadable
        self.counts.append(len(selection.sources))


def gather_samples(
    locations: Sequence[str], rules: SelectionRules, sampling: FrameSampling, clip_timeout: float
) -> Samples:
    """Return the samples of places; a place that is named several times is read once.

    Args:
        clip_timeout: seconds for probing a clip; one that takes longer is unreadable.

    Raises:
        UserError: a place has no usable clip, cannot be parsed, or lacks captions that are required.
    """
    samples, selections = Samples(), dict[str, Selection]()
    for location in locations:
        if location in selections:
            selections[location].report.repeat += 1
        else:
            selections[location] = select(location, rules, sampling, clip_timeout)
            for level, line in selections[location].report.lines():
                logger.log(level, "%s", line)
        samples.add(selections[location])
    samples.reports = {location: selection.report for location, selection in selections.items()}
    if empty := [location for location, selection in selections.items() if not selection.sources]:
        reasons = [counted(left.count, reason) for reason, left in samples.reports[empty[0]].left_out.items()]
        if reasons and not selections[empty[0]].unreadable:
            short = any(reason.startswith(TOO_SHORT) for reason in samples.reports[empty[0]].left_out)
            raise UserError(f"{empty[0]}: no clip is left: {'; '.join(reasons)}{ADVICE_FOR_SHORT if short else ''}")
    return samples


def check_readable(samples: Samples, max_share: float) -> None:
    """Log clips that could not be opened, and check that they are few.

    Args:
        max_share: largest share of unreadable clips, from 0 to 1.

    Raises:
        UserError: there are no clips, none is readable, or too many are unreadable.
    """
    readable, unreadable = len(samples.sources), samples.unreadable
    total = readable + len(unreadable)
    if not total:
        raise UserError("data: no clips were found; name a folder, a manifest or tar shards")
    for line in unreadable[:SHOWN]:
        logger.warning("left out, unreadable: %s", line)
    if unreadable and (not readable or len(unreadable) > max_share * total):
        raise UserError(
            f"{len(unreadable)} of {total} clips are unreadable, more than max_unreadable_share {max_share:g} allows; "
            f"the first: {unreadable[0]}"
        )
    if len(unreadable) > SHOWN:
        logger.warning("left out, unreadable: %d clips in all", len(unreadable))


def warn_of_mirrored_captions(sources: Sequence[ClipSource]) -> None:
    """Log a warning if captions of clips that may be mirrored say left or right."""
    sided = sum(bool(SIDES.search(source.caption or "")) for source in sources)
    if sided:
        said = counted(sided, "captions say")
        logger.warning("%s left or right, but horizontal_flip mirrors such clips too: set it to 0", said)
