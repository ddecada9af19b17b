"""Hash the content of files, such as checkpoints of many GB, and remember the hashes.

They are stored in `content_hashes.json` in `$XDG_CACHE_HOME/cogvideox-sat` (or `~/.cache`). A file counts as unchanged
as long as its path, size and time of change are the same. Nothing here imports PyTorch.
"""

import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cogvideox_sat.files.atomic import write_atomically

logger = logging.getLogger(__name__)

PIECE = 2**24  # bytes per read
MOST_REMEMBERED = 2000  # files
# A file that changed less than this long ago may change again within one tick of the file system's clock.
SETTLED_SECONDS = 2.0
LOCK_SECONDS = 0.1  # between two attempts to lock


class Stopped(Exception):
    """Raised inside a computation whose hash is no longer needed."""


def content_hash(files: Iterable[Path], stop: threading.Event | None = None) -> str:
    """Return the hash of the content of files; for one file `sha256:` and its SHA-256.

    For several files it is the SHA-256 of the lines `{hash of the content}  {name}`, sorted by name, so that a folder
    can be moved as a whole.

    Args:
        stop: when this is set, the computation ends.

    Raises:
        OSError: a file cannot be read.
        Stopped: `stop` is set.
    """
    files = sorted(files, key=lambda path: path.name)
    hashes = [_remembered_hash(path, stop) for path in files]
    if len(files) == 1:
        return f"sha256:{hashes[0]}"
    lines = "".join(f"{digest}  {path.name}\n" for digest, path in zip(hashes, files, strict=True))
    digest_of_all = hashlib.sha256(lines.encode("utf-8", "surrogateescape"))  # a name may be no valid text
    return f"sha256:{digest_of_all.hexdigest()}"


def hash_of_file(path: Path, stop: threading.Event | None = None) -> str:
    """Return the SHA-256 of a file's content as hexadecimal digits; always read the file.

    Raises:
        OSError: the file cannot be read.
        Stopped: `stop` is set.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            if stop is not None and stop.is_set():
                raise Stopped
    return digest.hexdigest()


# ---------------------------------------------------------------- remembering


def memory_file() -> Path:
    """Return the file that stores the hashes."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cogvideox-sat" / "content_hashes.json"


def _remembered_hash(path: Path, stop: threading.Event | None) -> str:
    path = path.resolve()
    stamp = _stamp(path)
    with _exclusively(stop):  # another process may be reading the same file
        known = _recall().get(str(path))
        if isinstance(known, dict) and known.get("stamp") == stamp and isinstance(known.get("hash"), str):
            return known["hash"]
        digest = hash_of_file(path, stop)
        if _stamp(path) == stamp and time.time() - max(stamp[1:3]) / 1e9 > SETTLED_SECONDS:
            _remember(str(path), {"stamp": stamp, "hash": digest})
    return digest


def _stamp(path: Path) -> list[int]:
    """Return numbers that change with a file: size, times of change in nanoseconds, inode."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


@contextmanager
def _exclusively(stop: threading.Event | None) -> Iterator[None]:
    """Let one process at a time run the block, if the folder of `memory_file` is writable.

    Raises:
        Stopped: `stop` is set while another process runs it.
    """
    try:
        file = memory_file().with_suffix(".lock")
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("w")
    except (OSError, RuntimeError):  # no home folder, or a read-only one
        yield
        return
    with lock:
        with suppress(OSError):  # a file system without locks
            while not _locked(lock):
                if stop is not None and stop.is_set():
                    raise Stopped
                time.sleep(LOCK_SECONDS)
        try:
            yield
        finally:
            with suppress(OSError):
                # Closing the file is not enough: a process that was forked meanwhile, to read a clip, has it open, too.
                fcntl.flock(lock, fcntl.LOCK_UN)


def _locked(file: IO[str]) -> bool:
    """Return whether this process could lock a file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _recall() -> dict[str, Any]:
    try:
        content = json.loads(memory_file().read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError, RecursionError):  # missing or damaged: it is made anew
        return {}
    return content if isinstance(content, dict) else {}


def _remember(path: str, entry: dict[str, Any]) -> None:
    content = _recall()
    content.pop(path, None)
    content[path] = entry  # the newest last
    content = dict(list(content.items())[-MOST_REMEMBERED:])
    try:
        write_atomically(memory_file(), json.dumps(content, indent=1) + "\n")
    except Exception as error:  # for example a full disk; the hash is computed again the next time
        logger.debug("hashes are not remembered: %s", error)


# ---------------------------------------------------------------- in the background


class BackgroundHashes:
    """Hashes of named sets of files, computed in a thread of their own.

    Args:
        files: the files for each name; an empty list if they are not on this machine.
    """

    def __init__(self, files: dict[str, list[Path]]):
        self._files = files
        self._hashes: dict[str, str | None] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="content hashes", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for name, files in self._files.items():
            try:
                self._hashes[name] = content_hash(files, self._stop) if files else None
            except Stopped:
                return
            except OSError as error:
                logger.warning("%s: its content cannot be read for a hash: %s", name, error.strerror or error)
                self._hashes[name] = None

    def so_far(self) -> dict[str, str | None]:
        """Return the hashes that are complete."""
        return dict(self._hashes)

    def all(self) -> dict[str, str | None]:
        """Wait for all hashes and return them; None for files that are missing or unreadable."""
        self._thread.join()
        return dict(self._hashes)

    def close(self) -> None:
        """Stop the computation of the remaining hashes."""
        self._stop.set()
        self._thread.join()
