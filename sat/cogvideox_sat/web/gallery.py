"""Finished videos, read from their folder so that a restart keeps them."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from secrets import token_hex
from typing import Any

from cogvideox_sat.configuration.video_records import read_record, record_path
from cogvideox_sat.web.shelves import Shelf
from sgm.errors import UserError

SUFFIX = ".mp4"
SHOWN = 24  # videos of a page


@dataclass(frozen=True)
class Entry:
    """A video of the gallery.

    Args:
        name: of its file.
        prompt: what it shows; empty: it has no record.
        fields: of the request that makes it again.
        adapters: paths with strengths.
    """

    name: str
    prompt: str
    fields: Mapping[str, Any]
    adapters: Mapping[str, float]


class Gallery:
    """The videos of a folder, with their records.

    Args:
        folder: that of the videos, which need not exist yet.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shelf = Shelf(folder, "video", lambda path: path.suffix == SUFFIX and path.is_file())
        self._entries: dict[str, tuple[float, Entry]] = {}

    def names(self) -> list[str]:
        """Return the names of all videos, the newest first."""
        times = []
        for name in self.shelf.names():
            try:
                times.append(((self.folder / name).stat().st_mtime_ns, name))
            except OSError:
                continue  # removed meanwhile
        return [name for _, name in sorted(times, reverse=True)]

    def entry(self, name: object) -> Entry:
        """Return a video, and what made it.

        Raises:
            UserError: it does not exist.
        """
        path = self.shelf.path(name)
        changed = path.stat().st_mtime
        known = self._entries.get(path.name)
        if known is None or known[0] != changed:
            known = self._entries[path.name] = changed, read_entry(path)
        return known[1]

    def entries(self, count: int = SHOWN) -> list[Entry]:
        """Return the newest videos."""
        return [self.entry(name) for name in self.names()[:count]]

    def new_path(self, now: datetime) -> Path:
        """Return where a new video goes."""
        return self.folder / f"{now:%Y%m%d-%H%M%S}-{token_hex(3)}{SUFFIX}"


def read_entry(path: Path) -> Entry:
    """Return a video and the content of its record.

    The entry has only the video's name if the record is missing or cannot be read.
    """
    beside = record_path(path)
    try:
        if beside.is_symlink():
            raise UserError(f"{beside} is a link")
        record = read_record(beside)
    except UserError:
        return Entry(path.name, "", {}, {})
    adapters = {each["path"]: float(each["scale"]) for each in record["adapters"]}
    return Entry(path.name, record["prompt"], record.request(), adapters)
