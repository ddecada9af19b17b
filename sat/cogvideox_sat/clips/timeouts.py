"""Record clips that took too long and were replaced, so that a resumed run uses the same.

    {run}/clip_timeouts-0000.jsonl, ...   one object per line, one file per process:
        data        "train_data" or "valid_data"
        step        step of the run; 0 for clips that were probed before the first
        epoch       epoch of the sample, or for validation the step
        sample      index of the sample in the data set
        clip        name of the clip that took too long
        reason      text for the list of unreadable clips
        substitute  name of the clip that was read instead; null if the clip was left out

Two rules decide which clips are not tried again. They depend only on the record, not on how far a process has read
ahead. A sample does not use the clips that are recorded for it. No sample of a step uses the clips that are recorded
for earlier steps.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from cogvideox_sat.clips.batch_order import SampleKey
from cogvideox_sat.files.refusals import refusal
from sgm.errors import UserError
from sgm.plain_json import parse_json

logger = logging.getLogger(__name__)

FILES = "clip_timeouts-*.jsonl"
BEFORE_TRAINING = 0  # the step of clips that took too long when the data was probed


@dataclass(frozen=True)
class TimedOutClip:
    """Line of the record; see the module's docstring."""

    data: str
    step: int
    epoch: int
    sample: int
    clip: str
    reason: str
    substitute: str | None


class ClipTimeouts:
    """Record of one kind of data, as far as this process knows it.

    Args:
        data: the kind of data.
        file: the file of this process to append to; None: nothing is written.
        known: entries recorded so far, of any kind.
        repeats: the same samples are read again at each step, as in evaluations.
    """

    def __init__(self, data: str, file: Path | None = None, known: Iterable[TimedOutClip] = (), repeats: bool = False):
        self.data, self.file, self.repeats = data, file, repeats
        self._entries: dict[tuple[int, int, str], TimedOutClip] = {}
        self._first: dict[str, TimedOutClip] = {}  # for each clip the entry of the earliest step
        self._pending: dict[tuple[int, int, str], TimedOutClip] = {}  # entries whose substitute is not known yet
        self._news: list[TimedOutClip] = []
        self.learn(known)

    def learn(self, entries: Iterable[TimedOutClip]) -> None:
        """Add entries of other processes."""
        for entry in entries:
            if entry.data == self.data:
                self._entries[entry.epoch, entry.sample, entry.clip] = entry
                if entry.clip not in self._first or entry.step < self._first[entry.clip].step:
                    self._first[entry.clip] = entry

    def refused(self, key: SampleKey, step: int) -> dict[str, str]:
        """Return the clips that a sample of `step` must not use, and the reasons."""
        if not self._entries and not self._pending:
            return {}
        refused = {clip: entry.reason for clip, entry in self._first.items() if entry.step < step}
        occasion = self._occasion(key, step)
        for entries in (self._entries, self._pending):
            refused |= {clip: entry.reason for (*place, clip), entry in entries.items() if tuple(place) == occasion}
        return refused

    def note(self, key: SampleKey, step: int, clip: str, reason: str) -> None:
        """Note that a clip took too long; `settle` records its substitute."""
        epoch, sample = self._occasion(key, step)
        self._pending[epoch, sample, clip] = TimedOutClip(self.data, step, epoch, sample, clip, reason, None)

    def settle(self, key: SampleKey, step: int, substitute: str | None) -> None:
        """Record the clips that were noted for a sample, once another clip has replaced them."""
        occasion = self._occasion(key, step)
        for place in [place for place in self._pending if place[:2] == occasion]:
            self.record([replace(self._pending.pop(place), substitute=substitute)])

    def record(self, entries: Iterable[TimedOutClip]) -> None:
        """Add and write entries of this process.

        Raises:
            UserError: the file cannot be written.
        """
        entries = list(entries)
        self.learn(entries)
        self._news += entries
        if self.file is not None and entries:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a+", encoding="utf-8") as file:
                    _end_line(file)
                    file.writelines(json.dumps(asdict(entry)) + "\n" for entry in entries)
            except OSError as error:
                raise UserError(f"cannot write {self.file}: {refusal(error)}") from error

    def take_news(self) -> list[TimedOutClip]:
        """Return the entries that were recorded since the last call."""
        news, self._news = self._news, []
        return news

    def _occasion(self, key: SampleKey, step: int) -> tuple[int, int]:
        return (step if self.repeats else key.epoch), key.index


def read_record(folder: Path) -> list[TimedOutClip]:
    """Return all entries that the processes of a run recorded in its folder.

    Raises:
        UserError: a file cannot be read.
    """
    entries = []
    for path in sorted(folder.glob(FILES)):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = refusal(error) if isinstance(error, OSError) else "not UTF-8 text; delete it"
            raise UserError(f"resume: cannot read {path}: {reason}") from error
        for number, line in enumerate(lines, start=1):
            try:
                entries.append(_entry(parse_json(line)))
            except (ValueError, TypeError) as error:
                if number == len(lines):  # cut off when the run was killed, before the step was complete
                    break
                raise UserError(f"resume: {path}, line {number}: not valid; delete the line, or the file") from error
    return entries


def _entry(content: dict[str, Any]) -> TimedOutClip:
    """Return the entry in a line.

    Raises:
        TypeError: the line has other keys or values than an entry.
    """
    entry = TimedOutClip(**content)
    numbers, texts = (entry.step, entry.epoch, entry.sample), (entry.data, entry.clip, entry.reason)
    if not all(type(value) is int for value in numbers) or not all(isinstance(value, str) for value in texts):
        raise TypeError("a value is of another type")
    return entry


def _end_line(file: TextIO) -> None:
    """Remove an incomplete last line, which a killed run left in the file."""
    file.seek(0)
    content = file.read()
    if content and not content.endswith("\n"):
        file.truncate(len(content[: content.rfind("\n") + 1].encode()))


def record_file(folder: Path, rank: int) -> Path:
    """Return the path of the file of process `rank`."""
    return folder / FILES.replace("*", f"{rank:04d}")


def left_out(problems: Mapping[str, str], data: str) -> list[TimedOutClip]:
    """Return entries for clips that took too long before training, given with their reasons."""
    return [TimedOutClip(data, BEFORE_TRAINING, -1, -1, clip, reason, None) for clip, reason in problems.items()]
