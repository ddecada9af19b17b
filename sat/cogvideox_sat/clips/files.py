"""Tell the kind of a clip's file by name and first bytes: video, image, or not readable.

Nothing here imports PyTorch.
"""

import io
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import BinaryIO

from cogvideox_sat.files.file_part import FilePart

VIDEO_SUFFIXES = frozenset(
    {
        *(".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".qt", ".3gp", ".3g2", ".f4v", ".flv", ".wmv", ".asf"),
        *(".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".mpe", ".m2v", ".m1v", ".vob", ".ogv", ".ogm", ".mxf", ".divx"),
        *(".mjpg", ".mjpeg", ".y4m"),
    }
)
# GIF, WebP and PNG files may be animated; they are then videos.
IMAGE_SUFFIXES = frozenset({".png", ".apng", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
CLIP_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
# Kinds of media that are not read; such files in a data set are reported.
UNREAD_SUFFIXES = frozenset(
    {
        *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".exr", ".hdr", ".tga", ".ico", ".ppm"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raw", ".yuv", ".rgb", ".ivf", ".obu", ".av1", ".vp9"),
        *(".h264", ".264", ".h265", ".265", ".hevc", ".avc", ".rm", ".rmvb", ".swf", ".dv", ".m3u8", ".mpd", ".bik"),
        *(".mp3", ".wav", ".flac", ".m4a", ".aac", ".ogg", ".oga", ".opus", ".wma", ".aiff", ".insv", ".braw", ".r3d"),
    }
)
UNFINISHED_SUFFIXES = frozenset({".part", ".ytdl", ".crdownload", ".download", ".tmp"})


@dataclass(frozen=True, slots=True)
class ClipSource:
    """Video or image file, or a member of a tar file.

    Attributes:
        path: the file.
        caption: None if the clip has none.
        member: name in the tar file; empty for a file of its own.
        start, size: position of the member's bytes in the tar file.
        animated: a file that is named like an image is animated; None: not known yet.
    """

    path: str
    caption: str | None
    member: str = ""
    start: int = 0
    size: int = 0
    animated: bool | None = None

    @property
    def name(self) -> str:
        """Return the name of the clip in messages."""
        return f"{self.path}/{self.member}" if self.member else self.path

    @property
    def is_image(self) -> bool:
        """Return whether the clip is an image that is not animated."""
        suffix = PurePath(self.member or self.path).suffix.lower()
        if suffix not in IMAGE_SUFFIXES:
            return False
        return not (is_animated(self.path, suffix, self.start) if self.animated is None else self.animated)

    def with_known_kind(self) -> "ClipSource":
        """Return the source with `animated` known, so that the file is not read again for it."""
        named_like_image = PurePath(self.member or self.path).suffix.lower() in IMAGE_SUFFIXES
        if self.animated is not None or not named_like_image:
            return self
        return replace(self, animated=not self.is_image)

    def read(self) -> bytes:
        """Return the content.

        Raises:
            OSError: the file is missing or shorter.
        """
        if not self.member:
            return Path(self.path).read_bytes()
        with io.BufferedReader(FilePart(self.path, self.start, self.size)) as file:
            return file.read()


def other_forms(name: str) -> list[str]:
    """Return other Unicode forms of a name: macOS decomposes accents, other systems do not."""
    if name.isascii():
        return []
    return [form for kind in ("NFC", "NFD") if (form := unicodedata.normalize(kind, name)) != name]


def unread_kind(name: str) -> str | None:
    """Return the suffix of a media file that is not read, such as `.heic` or `.mp4.part`.

    The result is None for all other files.
    """
    path = PurePath(name)
    suffix = path.suffix.lower()
    if suffix in UNFINISHED_SUFFIXES and PurePath(path.stem).suffix.lower() in CLIP_SUFFIXES:
        return PurePath(path.stem).suffix.lower() + suffix
    return suffix if suffix in UNREAD_SUFFIXES else None


# ---------------------------------------------------------------- animated images


def is_animated(path: str, suffix: str, start: int = 0) -> bool:
    """Return whether an image file, which begins at byte `start` of `path`, is animated.

    The result is False for a file that cannot be read; the error is reported when its pixels are read.
    """
    look = {
        ".webp": _is_animated_webp,
        ".gif": _is_animated_gif,
        ".png": _is_animated_png,
        ".apng": _is_animated_png,
    }.get(suffix)
    if look is None:
        return False
    try:
        with Path(path).open("rb") as file:
            file.seek(start)
            return look(file)
    except (OSError, EOFError):
        return False


def _read(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _is_animated_webp(file: BinaryIO) -> bool:
    """Return whether a WebP is animated, as a flag in its extended header says."""
    head = _read(file, 21)
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and bool(head[20] & 2)


def _is_animated_png(file: BinaryIO) -> bool:
    """Return whether a PNG is animated: a chunk before its pixels has the number of frames."""
    if _read(file, 8) != b"\x89PNG\r\n\x1a\n":
        return False
    while True:
        length, kind = int.from_bytes(_read(file, 4), "big"), _read(file, 4)
        if kind == b"acTL":
            return int.from_bytes(_read(file, 4), "big") > 1
        if kind in (b"IDAT", b"IEND"):
            return False
        file.seek(length + 4, io.SEEK_CUR)


def _is_animated_gif(file: BinaryIO) -> bool:
    """Return whether a GIF is animated: then its blocks hold a second image."""
    head = _read(file, 13)
    if head[:4] != b"GIF8":
        return False
    _skip_colours(file, head[10])
    images = 0
    while (block := _read(file, 1)) != b"\x3b":
        if block == b"\x2c":
            images += 1
            if images > 1:
                return True
            _skip_colours(file, _read(file, 9)[8])
            _read(file, 1)
        elif block == b"\x21":
            _read(file, 1)
        else:
            return False
        while size := _read(file, 1)[0]:
            file.seek(size, io.SEEK_CUR)
    return False


def _skip_colours(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        file.seek(3 << ((flags & 7) + 1), io.SEEK_CUR)
