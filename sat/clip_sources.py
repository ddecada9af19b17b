"""Where the clips of a dataset are, and what their captions say: folders, manifests and tar shards.

* A folder: every video and image below it. The caption of `videos/a/b.mp4` is the first line of `labels/a/b.txt`, or
  else of the `.txt` file beside the clip.
* A manifest: `.jsonl` with objects, or `.csv` with a header; `video` is a path, from the manifest's folder, `caption`
  may be missing.
* Tar shards in the layout of webdataset, members `name.mp4` and `name.txt` (or `name.json` with the caption under a
  key): a tar file, a folder of them, a pattern with `*`, or `{000..010}`. Only the headers and captions are read here;
  a clip is read from its place in the file when it is needed.

Images count as videos of one frame. Nothing here imports PyTorch.
"""

import csv
import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from sgm.errors import UserError

logger = logging.getLogger("train_video")

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
READERS = 16  # threads; small files on a network file system are a matter of waiting, not of computing


@dataclass(frozen=True, slots=True)
class ClipSource:
    """A video or image file, or a member of a tar file.

    Args:
        path: the file.
        member: name within the tar file; empty for a file of its own.
        start, size: where in the tar file the member's bytes are.
        caption: None where there is none.
    """

    path: str
    caption: str | None
    member: str = ""
    start: int = 0
    size: int = 0

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.path}/{self.member}" if self.member else self.path

    @property
    def is_image(self) -> bool:
        return Path(self.member or self.path).suffix.lower() in IMAGE_SUFFIXES

    def read(self) -> bytes:
        """The content. Raises OSError if it is not there."""
        if not self.member:
            return Path(self.path).read_bytes()
        with Path(self.path).open("rb") as file:
            file.seek(self.start)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"it ends after {len(data)} of {self.size} bytes")
        return data


def find_clips(location: str, txt_key: str = "caption") -> list[ClipSource]:
    """All clips of a folder, manifest, or tar shards, in an order that is the same on every machine.

    Args:
        txt_key: the key of the caption in `.json` members of tar shards.

    Raises:
        UserError: there are none, or a file cannot be understood.
    """
    if re.match(r"[a-z][a-z0-9+.-]*:", location) and not Path(location).exists():
        raise UserError(
            f"{location}: clips are read from files: download them, or mount where they are, and give that path"
        )
    if re.search(r"\.(tar\.\w+|tgz|tbz2?|txz)$", location):
        raise UserError(f"{location}: compressed tar files cannot be read in any order; unpack it to a plain .tar")
    path = Path(location)
    if path.is_dir():
        shards = sorted(str(file) for file in path.glob("*.tar"))
        return _tar_clips(shards, txt_key) if shards else _folder_clips(path)
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".csv"):
        return _manifest_clips(path)
    if suffix == ".tar":
        return _tar_clips(_expand(location), txt_key)
    what = "is no folder, .jsonl, .csv or .tar file" if path.exists() else "does not exist"
    raise UserError(f"training data: {location} {what}")


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


def _folder_clips(root: Path) -> list[ClipSource]:
    clips = sorted(_clip_files(root), key=lambda path: path.relative_to(root).parts)
    if not clips:
        kinds = ", ".join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))
        raise UserError(
            f"no videos found in {root}: expected files such as videos/name.mp4 and labels/name.txt ({kinds})"
        )
    with ThreadPoolExecutor(READERS) as threads:
        captions = list(threads.map(_caption_beside, clips))
    return [ClipSource(str(path), caption) for path, caption in zip(clips, captions, strict=True)]


def _clip_files(root: Path) -> Iterator[Path]:
    visited = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:  # a link to a folder above, which would never end
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if Path(name).suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES and not name.startswith("."):
                yield Path(folder, name)


def _caption_beside(clip: Path) -> str | None:
    for label in _label_files(clip):
        try:
            return _first_line(label.read_bytes(), str(label))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"cannot read the label {label}: {error.strerror or error}") from error
    return None


def _label_files(clip: Path) -> Iterator[Path]:
    """Where the label of a clip may be: under `labels` instead of the innermost `videos`, or beside it."""
    beside = clip.with_suffix(".txt")
    parts = list(beside.parts)
    if "videos" in parts[:-1]:
        parts[len(parts) - 1 - parts[::-1].index("videos")] = "labels"
        yield Path(*parts)
    yield beside


def _first_line(content: bytes, name: str) -> str | None:
    """None if it is empty, which is as good as no label."""
    try:
        return content.decode("utf-8-sig").strip().partition("\n")[0].strip() or None
    except UnicodeDecodeError as error:
        raise UserError(f"the label {name} is not UTF-8 text: save it as UTF-8") from error


# ---------------------------------------------------------------------------------------------------------------------
# Manifests
# ---------------------------------------------------------------------------------------------------------------------


def _manifest_clips(path: Path) -> list[ClipSource]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the manifest {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the manifest {path} is not UTF-8 text: save it as UTF-8") from error
    records = _json_lines(text, path) if path.suffix.lower() == ".jsonl" else _csv_lines(text, path)
    clips = []
    for line, record in records:
        video, caption = record.get("video"), record.get("caption")
        if not isinstance(video, str) or not video:
            raise UserError(f"{path}, line {line}: 'video' must be the path of a clip, got {video!r}")
        if not isinstance(caption, str | None):
            raise UserError(f"{path}, line {line}: 'caption' must be text, got {caption!r}")
        caption = (caption or "").strip() or None
        clips.append(ClipSource(os.path.normpath(path.parent / video), caption))
    if not clips:
        raise UserError(f"no videos found in {path}: write one a line, with 'video' and 'caption'")
    return clips


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    # Not str.splitlines, which also breaks at characters such as U+2028 that may stand inside a caption.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(record, dict):
            raise UserError(
                f'{path}, line {number}: expected an object such as {{"video": "a.mp4", "caption": "a cat"}}'
            )
        yield number, record


def _csv_lines(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if "video" not in (reader.fieldnames or ()):
        raise UserError(f"{path}: the first line must name the columns, 'video' and 'caption' among them")
    try:
        yield from ((reader.line_num, record) for record in reader)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Tar shards
# ---------------------------------------------------------------------------------------------------------------------


def _expand(pattern: str) -> list[str]:
    """The files of a pattern with braces and wildcards."""
    from braceexpand import braceexpand

    shards = []
    for part in braceexpand(pattern):
        if Path(part).exists():
            shards.append(part)
        elif any(char in part for char in "*?["):
            shards += sorted(glob(part))  # noqa: PTH207
        else:
            raise UserError(f"training data: {part} does not exist")
    if not shards:
        raise UserError(f"training data: no file fits {pattern}")
    return shards


def _tar_clips(shards: Sequence[str], txt_key: str) -> list[ClipSource]:
    with ThreadPoolExecutor(READERS) as threads:
        clips = [clip for found in threads.map(lambda shard: list(_members(shard, txt_key)), shards) for clip in found]
    if not clips:
        raise UserError(f"no videos found in {', '.join(shards[:3])}: expected members such as name.mp4 and name.txt")
    return clips


def _members(shard: str, txt_key: str) -> Iterator[ClipSource]:
    """The clips of a shard. Members of one sample have the same name up to the first dot, and follow each other."""
    sample, members = None, {}
    for member in _headers(shard):
        folder, _, file = member.name.rpartition("/")
        key, _, kind = file.partition(".")
        if sample != (folder, key):
            yield from _clip_of(shard, members, txt_key)
            sample, members = (folder, key), {}
        members[f".{kind.lower()}"] = member
    yield from _clip_of(shard, members, txt_key)


def _headers(shard: str) -> Iterator[tarfile.TarInfo]:
    """The files of a shard, those that lie in it completely."""
    end = Path(shard).stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive:
            while member := archive.next():
                if member.isfile() and member.offset_data + member.size <= end:
                    yield member
                archive.members.clear()  # which would come to hold all of them
    except tarfile.ReadError as error:
        logger.warning("%s: damaged or cut off (%s); the clips before that are used", shard, error)
    except OSError as error:
        raise UserError(f"cannot read {shard}: {error.strerror or error}") from error


def _clip_of(shard: str, members: dict[str, tarfile.TarInfo], txt_key: str) -> Iterator[ClipSource]:
    for suffix, member in members.items():
        if suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
            caption = _caption_in(shard, members, txt_key)
            yield ClipSource(shard, caption, member.name, member.offset_data, member.size)
            return


def _caption_in(shard: str, members: dict[str, tarfile.TarInfo], txt_key: str) -> str | None:
    for suffix in (".txt", ".json"):
        if not (member := members.get(suffix)):
            continue
        label = ClipSource(shard, None, member.name, member.offset_data, member.size)
        if suffix == ".txt":
            return _first_line(label.read(), label.name)
        try:
            record = json.loads(label.read())
        except ValueError as error:  # not JSON, or not UTF-8
            raise UserError(f"{label.name}: not valid JSON ({error})") from error
        caption = record.get(txt_key) if isinstance(record, dict) else None
        return caption.strip() or None if isinstance(caption, str) else None
    return None
