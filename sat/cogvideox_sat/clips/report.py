"""Report the clips of a place and the files that are left out, with the reasons.

The report is for the log and for `--inspect_data`.

Nothing here imports PyTorch.
"""

import logging
from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from sgm.errors import printable

SINGULAR = {  # beginnings of reasons
    "videos are": "video is",
    "pictures beside videos have": "picture beside videos has",
    "clips have": "clip has",
    "clips lie": "clip lies",
    "clips could": "clip could",
    "labels have": "label has",
    "files look": "file looks",
    "captions say": "caption says",
}
EXAMPLES = 5  # names of files to keep for each reason
MUCH = 1 / 3 + 1e-6  # share of a picture; if a crop removes more, there is a warning


@dataclass
class ExcludedFiles:
    """Number of files that are left out for one reason, and the names of some."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count a file, and keep the first names."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(name)


def counted(count: int, reason: str) -> str:
    """Return a count with its reason: "3 videos are shorter", or "1 video is shorter" for 1."""
    for plural, singular in SINGULAR.items():
        if count == 1 and reason.startswith(plural):
            return f"1 {singular}{reason[len(plural) :]}"
    return f"{count} {reason}"


@dataclass
class SourceReport:
    """Report about one place of `train_data` or `valid_data`.

    Attributes:
        location: the place as given.
        repeat: how often the place is given.
        videos, pictures: number of files that are used.
        samples: number of clips that are cut out of these.
        captions_missing: number of files without a caption; None: captions are not used.
        long_labels: number of label files with several lines.
        label_lines: lines of such a file that are used, "first" or "all".
        left_out: files that are left out, by reason.
        unread: number of files that look like media and are not read, by suffix.
        hints: files that look like captions and are not used.
        shapes: number of samples by frames, height and width.
        seconds: lengths of the videos.
        cut_away: for every file the share of the picture that is cropped.
    """

    location: str
    repeat: int = 1
    videos: int = 0
    pictures: int = 0
    samples: int = 0
    captions_missing: int | None = 0
    long_labels: int = 0
    label_lines: str = "first"
    left_out: dict[str, ExcludedFiles] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    hints: list[str] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    cut_away: list[float] = field(default_factory=list)

    def leave_out(self, reason: str, name: str) -> None:
        """Count a file that is not used."""
        self.left_out.setdefault(reason, ExcludedFiles()).add(printable(name))

    def lines(self) -> list[tuple[int, str]]:
        """Return the lines for the log, each with its level."""
        lines = [
            (logging.WARNING, f"left out: {counted(left.count, reason)}; the first: {left.examples[0]}")
            for reason, left in self.left_out.items()
        ]
        if self.unread:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.unread.items()))
            lines.append(
                (logging.WARNING, f"{counted(sum(self.unread.values()), 'files look')} like media, not read: {kinds}")
            )
        if self.long_labels:
            used = "all are joined" if self.label_lines == "all" else "the first is used (label_lines: all joins them)"
            lines.append((logging.WARNING, f"{counted(self.long_labels, 'labels have')} several lines; {used}"))
        lines += self._crops()
        return [(level, f"{self.location}: {line}") for level, line in lines]

    def _crops(self) -> list[tuple[int, str]]:
        if not self.cut_away or max(self.cut_away) < 0.005:
            return []
        mean, most = sum(self.cut_away) / len(self.cut_away), max(self.cut_away)
        line = f"crops cut away {mean:.0%} of the picture on average, {most:.0%} at most"
        if not (many := sum(share > MUCH for share in self.cut_away)):
            return [(logging.INFO, line)]
        remedy = "add a size of their shape to video_size"
        return [(logging.WARNING, f"{line}; {many} of {len(self.cut_away)} lose more than a third: {remedy}")]

    def as_json(self) -> dict[str, Any]:
        """Return the report as numbers, texts, lists and dictionaries."""
        content = asdict(self)
        content["shapes"] = dict(self.shapes)
        content["seconds"] = self.lengths()
        content["cut_away"] = self.crop_shares()
        return content

    def lengths(self) -> dict[str, float] | None:
        """Return the shortest, median and longest video in seconds; None if there are no videos."""
        if not self.seconds:
            return None
        values = {"min": min(self.seconds), "median": median(self.seconds), "max": max(self.seconds)}
        return {name: round(value, 3) for name, value in values.items()}

    def crop_shares(self) -> dict[str, float] | None:
        """Return the mean and largest share of pictures that is cropped; None if none are used."""
        if not self.cut_away:
            return None
        mean = sum(self.cut_away) / len(self.cut_away)
        return {"mean": round(mean, 4), "max": round(max(self.cut_away), 4)}
