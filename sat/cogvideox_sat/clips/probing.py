"""Read size and length of every clip of a dataset once; keep them in `.clip_index.json`."""

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from cogvideox_sat.clips.attempts import CLIP_TIMEOUT, attempt, note_late, refusal
from cogvideox_sat.clips.items_in_processes import in_processes
from cogvideox_sat.clips.reading import ClipInfo, probe
from cogvideox_sat.clips.sources import READERS, ClipSource
from cogvideox_sat.files.atomic import replaced_when_complete
from cogvideox_sat.media.video_facts import UnreadableClip
from sgm.errors import UserError, printable
from sgm.plain_json import parse_json

logger = logging.getLogger(__name__)

INDEX = ".clip_index.json"
VERSION = 2
REPORT_EVERY = 10  # seconds

Stamp = tuple[int, int]  # size in bytes and time of the last change in nanoseconds
Index = dict[str, tuple[Stamp, ClipInfo]]


def probe_clips(
    sources: Sequence[ClipSource], folder: Path, clip_timeout: float = CLIP_TIMEOUT
) -> tuple[list[ClipInfo | None], list[str]]:
    """Probe all clips, except unchanged clips in the index of `folder`.

    If several processes start together, the others wait for the first to write the index, if the file system supports
    locks and is writable; otherwise each process probes all clips. Clips are opened in separate processes, which are
    killed and replaced if a clip takes longer than `clip_timeout` seconds.

    Returns:
        for every source its facts, or None if it is unreadable; and a line for each unreadable source.
    """
    with _taking_turns(folder):
        known = _read_index(folder / INDEX)
        infos: list[ClipInfo | None] = []
        problems: list[str] = []
        index: Index = {}
        found: dict[str, ClipInfo | str] = {}
        said = time.monotonic()
        with ThreadPoolExecutor(READERS) as threads:
            stamps = list(threads.map(lambda source: _stamp(source, folder), sources))
        for source, (key, stamp) in zip(sources, stamps, strict=True):
            if reason := refusal(source.name):
                found[source.name] = reason
            elif stamp is not None and key in known and known[key][0] == stamp:
                found[source.name] = known[key][1]
        new = [source for source in sources if source.name not in found]
        probed = in_processes(_probe, new, _name, _note_late, READERS, clip_timeout)
        with closing(probed):
            for source, (key, stamp) in zip(sources, stamps, strict=True):
                result = found[source.name] if source.name in found else next(probed)
                if isinstance(result, ClipInfo):
                    infos.append(result)
                    if stamp is not None:  # None: the file appeared while others were probed
                        index[key] = (stamp, result)
                else:
                    infos.append(None)
                    problems.append(printable(f"{source.name}: {result}"))
                if time.monotonic() - said > REPORT_EVERY:
                    logger.info("probed %d of %d clips", len(infos), len(sources))
                    said = time.monotonic()
        if any(known.get(key) != entry for key, entry in index.items()):
            _write_index(folder / INDEX, {**known, **index})
    return infos, problems


def _stamp(source: ClipSource, folder: Path) -> tuple[str, Stamp | None]:
    """Return the clip's key in the index and its stamp; None if the file does not exist."""
    key = os.path.relpath(source.name, folder)
    try:
        status = Path(source.path).stat()
    except OSError:
        return key, None
    return key, (status.st_size, status.st_mtime_ns)


def _name(source: ClipSource) -> str:
    return source.name


def _note_late(source: ClipSource, reason: str) -> str:
    return note_late(source.name, reason)


def _probe(source: ClipSource) -> ClipInfo | str:
    """Return the facts of a clip, or the reason why it cannot be read."""
    try:
        with attempt(source.name):
            Path(source.path).stat()
            return probe(source)
    except OSError as error:
        return error.strerror or str(error)
    except UnreadableClip as problem:
        return str(problem)


@contextmanager
def _taking_turns(folder: Path) -> Iterator[None]:
    descriptor = None
    with suppress(OSError):  # the folder does not exist, or the file system has no locks
        if os.access(folder, os.W_OK):  # otherwise no index will be written
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("waiting for another process that probes the clips in %s", folder)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _read_index(path: Path) -> Index:
    """Return the index of an earlier run; {} if it is missing or has another format."""
    try:
        content = parse_json(path.read_bytes())
        if content["version"] != VERSION:
            return {}
        return {key: (tuple(stamp), ClipInfo(*info)) for key, (stamp, info) in content["clips"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_index(path: Path, index: Index) -> None:
    # If the index cannot be written, the next run probes again.
    with suppress(UserError), replaced_when_complete(path) as part:
        part.write_text(json.dumps({"version": VERSION, "clips": index}))
