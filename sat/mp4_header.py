"""The header of an .mp4 or .mov file: a few kilobytes that tell size, length and rotation, without decoding anything.

The boxes and their fields are those of ISO/IEC 14496-12 (ISO base media file format). Nothing here imports PyTorch.
"""

import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

LARGEST_HEADER = 2**28  # bytes; hours of video have a few megabytes
MOST_FRAMES = 10**8


class VideoHeader(NamedTuple):
    """`width` and `height` as shown, after rotation; `seconds` from the first frame to the last."""

    width: int
    height: int
    frames: int
    seconds: float


def read_header(file: BinaryIO, start: int, end: int) -> VideoHeader | None:
    """The header of the file that lies in `file` from byte `start` to `end`.

    Returns:
        None if this is not such a file, or keeps its lengths elsewhere (fragmented): open it with a decoder.

    Raises:
        EOFError: the file is shorter than it says.
    """
    movie = None
    for number, (kind, content, after) in enumerate(_file_boxes(file, start, end)):
        if number == 0 and kind != b"ftyp":
            return None
        if after > end:
            raise EOFError(f"cut off: it should have at least {after - start} bytes and has {end - start}")
        if kind == b"moov" and after - content <= LARGEST_HEADER:
            file.seek(content)
            movie = file.read(after - content)
    try:
        return None if movie is None or _child(movie, b"mvex") else _video_track(movie)
    except (struct.error, ValueError):  # too short for its fields
        return None


def _file_boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The outermost boxes: (type, where the content begins, where the next box begins)."""
    while end - start >= 8:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        content = start + 8
        if size == 1 and end - start >= 16:  # a large box: the size follows, in 64 bits
            size, content = struct.unpack(">Q", file.read(8))[0], start + 16
        after = end if size == 0 else start + size
        if after < content:
            return
        yield kind, content, after
        start = after


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 0
    while len(data) - position >= 8:
        size, kind = struct.unpack_from(">I4s", data, position)
        if size < 8:
            return
        yield kind, data[position + 8 : position + size]
        position += size


def _child(data: bytes, *path: bytes) -> bytes | None:
    """The content of the box below `data` at a path of types, the first of each type."""
    for wanted in path:
        data = next((content for kind, content in _boxes(data) if kind == wanted), None)
        if data is None:
            return None
    return data


def _video_track(movie: bytes) -> VideoHeader | None:
    for kind, track in _boxes(movie):
        handler = _child(track, b"mdia", b"hdlr") if kind == b"trak" else None
        if handler and handler[8:12] == b"vide":
            return _track_header(track)
    return None


def _track_header(track: bytes) -> VideoHeader | None:
    placement, media = _child(track, b"tkhd"), _child(track, b"mdia", b"mdhd")
    samples = _child(track, b"mdia", b"minf", b"stbl")
    description, durations = _child(samples or b"", b"stsd"), _child(samples or b"", b"stts")
    if not (placement and media and description and durations):
        return None
    (timescale,) = struct.unpack_from(">I", media, 20 if media[0] else 12)  # version 1 has longer dates before it
    width, height = struct.unpack_from(">HH", description, 40)
    times = _times(durations, _child(samples, b"ctts"))
    if not (width and height and timescale and len(times)):
        return None
    a, _, _, _, d = struct.unpack_from(">5i", placement, 52 if placement[0] else 40)  # of the matrix a b u, c d v
    if a == d == 0:  # turned by a quarter
        width, height = height, width
    return VideoHeader(width, height, len(times), int(times.max() - times.min()) / timescale)


def _times(durations: bytes, offsets: bytes | None) -> np.ndarray:
    """When each frame is shown, in the order of decoding: the durations before it plus its offset, in ticks."""
    times = np.cumsum(_runs(durations)) - _runs(durations)
    if offsets:
        # Offsets are unsigned in version 0, where they are nevertheless often meant to be signed.
        shifts = _runs(offsets).astype(np.int32)
        times = times[: len(shifts)] + shifts[: len(times)]
    return times


def _runs(table: bytes) -> np.ndarray:
    """The values of a run-length coded table of (count, value); none if it is longer than any video."""
    (entries,) = struct.unpack_from(">I", table, 4)
    counts, values = np.frombuffer(table, ">u4", offset=8)[: 2 * entries].reshape(-1, 2).T.astype(np.int64)
    return np.repeat(values, counts) if counts.sum() < MOST_FRAMES else values[:0]
