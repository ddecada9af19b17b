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

from cogvideox_sat.clips.attempts import CLIP_TIMEOUT, attempt, note_late, reason_refused
from cogvideox_sat.clips.items_in_processes import in_processes
from cogvideox_sat.clips.reading import probe
from cogvideox_sat.clips.sources import READERS, ClipSource
from cogvideox_sat.files.atomic import write_atomically
from cogvideox_sat.media.video_facts import UnreadableClip, VideoFacts
from sgm.errors import UserError, printable
from sgm.plain_json import parse_json

logger = logging.getLogger(__name__)

INDEX = ".clip_index.json"
VERSION = 2
REPORT_EVERY = 10  # seconds

Stamp = tuple[int, int]  # size in bytes and time of the last change in nanoseconds
Index = dict[str, tuple[Stamp, VideoFacts]]


def probe_clips(
    sources: Sequence[ClipSource], folder: Path, clip_timeout: float = CLIP_TIMEOUT
) -> tuple[list[VideoFacts | None], list[str]]:
    """Probe all clips, except unchanged clips in the index of `folder`.

    If several processes start together, the others wait for the first to write the index, if the file system supports
    locks and is writable; otherwise each process probes all clips. Clips are opened in separate processes, which are
    killed and replaced if a clip takes longer than `clip_timeout` seconds.

    Returns:
        for every source its facts, or None if it is unreadable; and a line for each unreadable source.
    """
    with _taking_turns(folder):
        known = _read_index(folder / INDEX)
        infos: list[VideoFacts | None] = []
        problems: list[str] = []
        index: Index = {}
        found: dict[str, VideoFacts | str] = {}
        said = time.monotonic()
        with ThreadPoolExecutor(READERS) as threads:
            stamps = list(threads.map(lambda source: _stamp(source, folder), sources))
        for source, (key, stamp) in zip(sources, stamps, strict=True):
            if reason := reason_refused(source.name):
                found[source.name] = reason
            elif stamp is not None and key in known and known[key][0] == stamp:
                found[source.name] = known[key][1]
        new = [source for source in sources if source.name not in found]
        probed = in_processes(_probe, new, _name, _note_late, READERS, clip_timeout)
        with closing(probed):
            for source, (key, stamp) in zip(sources, stamps, strict=True):
                result = found[source.name] if source.name in found else next(probed)
                if isinstance(result, VideoFacts):
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


def _probe(source: ClipSource) -> VideoFacts | str:
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
    """Let one process at a time probe the clips of a folder, if the folder is writable."""
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
            with suppress(OSError):
                # Closing it is not enough: a process that reads a clip, and cannot be killed, has it open, too.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _read_index(path: Path) -> Index:
    """Return the index of an earlier run; {} if it is missing or has another format."""
    try:
        content = parse_json(path.read_bytes())
        if content["version"] != VERSION:
            return {}
        index = {key: (tuple(stamp), VideoFacts(*info)) for key, (stamp, info) in content["clips"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {key: (stamp, info) for key, (stamp, info) in index.items() if _are_facts(info)}


def _are_facts(info: VideoFacts) -> bool:
    """Return whether the values are those of a clip; otherwise the index is damaged."""
    *sizes, seconds = info
    return all(type(size) is int and size > 0 for size in sizes) and type(seconds) in (int, float) and seconds >= 0


def _write_index(path: Path, index: Index) -> None:
    with suppress(UserError):  # for example a full disk; the next run probes again
        write_atomically(path, json.dumps({"version": VERSION, "clips": index}))
