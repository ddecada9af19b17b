"""Access folders and tar files as trees of names, in the same way.

Nothing here imports PyTorch.
"""

import logging
import os
import posixpath
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from cogvideox_sat.clips.files import CLIP_SUFFIXES, ClipSource
from cogvideox_sat.files.refusals import refusal
from sgm.errors import UserError

logger = logging.getLogger(__name__)


class Tree(ABC):
    """Files below one root; a name is a path relative to it, with `/` between its parts."""

    names: Sequence[str]  # names of the files, in a fixed order

    @abstractmethod
    def has(self, name: str) -> bool:
        """Return whether a file exists; names in folders may lead outside with `..`."""

    @abstractmethod
    def has_folder(self, name: str) -> bool:
        """Return whether a folder has files; names in folders may lead outside with `..`."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            UserError: the file cannot be read.
        """

    @abstractmethod
    def source(self, name: str, caption: str | None) -> ClipSource:
        """Return the clip of this name."""

    @abstractmethod
    def shown(self, name: str) -> str:
        """Return the name of a file in messages."""

    def elsewhere(self, path: str, caption: str | None) -> ClipSource | None:
        """Return the clip outside of the tree that a list names; None if there can be none."""
        return None

    def without_doubles(self, clips: Sequence[ClipSource]) -> Sequence[ClipSource]:
        """Return the clips without those that a link to their folder shows a second time.

        With different captions both are kept. If only one of them has a caption, that one is kept.
        """
        return clips

    def parts_of(self, folder: str) -> tuple[str, ...]:
        """Return the parts of a folder's path, including those above the root."""
        return PurePosixPath(folder).parts

    def within(self, path: str) -> str:
        """Return the name of a path in a list, if the path is in the tree, else the path."""
        return path

    def other_stems(self, stem: str) -> Iterator[str]:
        """Yield other names, without suffix, that the label of a clip may have."""
        yield from ()

    def relative(self, parts: Sequence[str]) -> str:
        """Return the name of a folder with these parts of a path."""
        return "/".join(parts)


class Folder(Tree):
    """Files below a folder, including linked folders; hidden files are left out."""

    def __init__(self, root: Path):
        self.root = root
        self.has_doubles = False  # links lead to the same folder twice
        self.names = sorted(self._walk(), key=lambda name: PurePosixPath(name).parts)
        self.files = set(self.names)
        self.folders = {name.rpartition("/")[0] for name in self.names}
        self._listed: dict[str, set[str]] = {}  # folders outside of the root

    def _walk(self) -> Iterator[str]:
        visited: set[str] = set()
        above: dict[str, frozenset[str]] = {}  # for each folder, the real paths of itself and of the folders above it
        for folder, folders, files in os.walk(self.root, onerror=_warn_of_folder, followlinks=True):
            higher, real = above.get(os.path.dirname(folder), frozenset()), os.path.realpath(folder)  # noqa: PTH120
            if real in higher:  # a link to a folder above is an endless loop
                folders.clear()
                continue
            above[folder] = higher | {real}
            self.has_doubles |= real in visited
            visited.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            place = Path(folder).relative_to(self.root).as_posix()
            for name in files:
                if not name.startswith("."):
                    yield name if place == "." else f"{place}/{name}"

    def has(self, name: str) -> bool:
        if not name.startswith("../"):
            return name in self.files
        folder, file = posixpath.split(name)
        return file in self._outside(folder)

    def has_folder(self, name: str) -> bool:
        return bool(self._outside(name)) if name.startswith("../") else name in self.folders

    def _outside(self, folder: str) -> set[str]:
        if folder not in self._listed:
            self._listed[folder] = set()
            try:
                self._listed[folder] |= set(os.listdir(self._path(folder)))  # noqa: PTH208
            except NotADirectoryError:
                pass
            except OSError as error:
                _warn_of_folder(error)
        return self._listed[folder]

    def _path(self, name: str) -> Path:
        return Path(os.path.normpath(self.root / name)) if name.startswith("../") else self.root / name

    def read(self, name: str) -> bytes:
        try:
            return self._path(name).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the label {self._path(name)}: {refusal(error)}") from error

    def source(self, name: str, caption: str | None) -> ClipSource:
        return ClipSource(str(self.root / name), caption).with_known_kind()

    def shown(self, name: str) -> str:
        return str(self._path(name))

    def elsewhere(self, path: str, caption: str | None) -> ClipSource | None:
        return ClipSource(os.path.normpath(self.root / path), caption)

    def without_doubles(self, clips: Sequence[ClipSource]) -> Sequence[ClipSource]:
        if not self.has_doubles:
            return clips
        files = [os.path.realpath(clip.path) for clip in clips]
        captioned = {file for file, clip in zip(files, clips, strict=True) if clip.caption}
        kept: dict[tuple[str, str | None], ClipSource] = {}
        for file, clip in zip(files, clips, strict=True):
            if clip.caption or file not in captioned:
                kept.setdefault((file, clip.caption), clip)
        return list(kept.values())

    def parts_of(self, folder: str) -> tuple[str, ...]:
        return (*self.root.parts, *PurePosixPath(folder).parts)

    def relative(self, parts: Sequence[str]) -> str:
        name = posixpath.relpath(Path(*parts).as_posix(), self.root.as_posix())
        return "" if name == "." else name

    def within(self, path: str) -> str:
        return self.relative(Path(path).parts) if path.startswith("/") else path


def _warn_of_folder(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        logger.warning("%s cannot be read (%s); its content is left out", error.filename, error.strerror)


class TarFile(Tree):
    """Members of a tar file that are complete; only headers and captions are read."""

    def __init__(self, path: str):
        self.path = path
        self.members: dict[str, tuple[str, int, int]] = {}  # by name: the name as written, start and size
        links: list[tuple[str, str]] = []
        for member in self._headers():
            name = _plain(member.name)
            if PurePosixPath(name).name.startswith("."):
                continue
            if member.isfile():
                self.members[name] = (member.name, member.offset_data, member.size)
            else:
                links.append((name, member.linkname if member.islnk() else posixpath.join(name, "..", member.linkname)))
        self._follow(links)
        self.names = list(self.members)
        self.folders = {name.rpartition("/")[0] for name in self.names}

    def _follow(self, links: Sequence[tuple[str, str]]) -> None:
        """Give links the bytes of their members, and report links that lead outside."""
        outside = []
        for name, target in links:
            if (target := _plain(target)) in self.members:
                self.members[name] = (name, *self.members[target][1:])
            elif PurePosixPath(name).suffix.lower() in CLIP_SUFFIXES:
                outside.append(name)
        if outside:
            logger.warning(
                "%s: clips that are links to files outside are left out: %d, the first is %s",
                *(self.path, len(outside), outside[0]),
            )

    def _headers(self) -> Iterator[tarfile.TarInfo]:
        """Yield the headers of plain files and of links in the tar file."""
        try:
            end = Path(self.path).stat().st_size
            with tarfile.open(self.path, "r:") as archive:
                while member := archive.next():
                    if member.issparse():
                        logger.warning("%s: %s is a sparse file and left out", self.path, member.name)
                    elif member.issym() or member.islnk() or (member.isfile() and _end(member) <= end):
                        yield member
                    # The list would otherwise grow to all members.
                    archive.members.clear()  # type: ignore[attr-defined]  # not in typeshed
        except tarfile.ReadError as error:
            logger.warning("%s: damaged or cut off (%s); the clips before that are used", self.path, error)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {refusal(error)}") from error

    def has(self, name: str) -> bool:
        return name in self.members

    def has_folder(self, name: str) -> bool:
        return name in self.folders

    def read(self, name: str) -> bytes:
        try:
            return self.source(name, None).read()
        except OSError as error:
            raise UserError(f"cannot read {self.shown(name)}: {refusal(error)}") from error

    def source(self, name: str, caption: str | None) -> ClipSource:
        return ClipSource(self.path, caption, *self.members[name]).with_known_kind()

    def shown(self, name: str) -> str:
        return f"{self.path}/{name}"

    def other_stems(self, stem: str) -> Iterator[str]:
        if "." in stem:  # in webdataset's layout, the members of a sample share the name up to the first dot
            yield stem.partition(".")[0]


def _plain(name: str) -> str:
    """Return a member's name, normalized and relative; absolute names are harmless in reading."""
    return posixpath.normpath(name).lstrip("/")


def _end(member: tarfile.TarInfo) -> int:
    return member.offset_data + member.size


def included_shards(include_dirs: str | None) -> list[str]:
    """Return the tar files below the folders of `include_dirs`, in a fixed order.

    Hidden and empty files are left out.

    Args:
        include_dirs: folders, separated by commas; `FOLDER*2` gives the files of FOLDER twice. None: none.

    Raises:
        UserError: a folder has no tar file, or a number of repeats is malformed.
    """
    if include_dirs is None:
        return []
    if not isinstance(include_dirs, str):
        raise UserError(f"data: include_dirs: got {include_dirs!r}; expected folders with commas between")
    shards = []
    for part in include_dirs.split(","):
        folder, _, times = part.strip().partition("*")
        if times and not times.isdecimal():
            raise UserError(f"data: include_dirs has '{part}'; write FOLDER*2 to read the shards of FOLDER twice")
        found = sorted(
            str(shard) for shard in Path(folder).rglob("[!.]*.tar") if shard.is_file() and shard.stat().st_size
        )
        if not found:
            raise UserError(f"data: include_dirs: {folder} holds no .tar file; name a folder of shards")
        shards += found * int(times or 1)
    return shards
