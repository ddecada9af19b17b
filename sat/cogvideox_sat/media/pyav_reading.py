"""Read videos with PyAV, whose wheels include FFmpeg.

The frames of a clip are found by their times. The reader seeks to the last key frame before the first wanted frame,
reads the times of the packets from there, and decodes only the packets that the wanted frames depend on.

There are three ways to decode, each slower and more robust than the one before: without packets that no wanted frame
depends on; with all packets from the key frame on; with all packets of the file, for files that mark key frames
wrongly. A file is damaged if the third way fails.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
from av import VideoFrame

from cogvideox_sat.media.frame_pixels import FramePixels
from cogvideox_sat.media.frame_times import COARSEST_ROUNDING, ROUNDING, nearest_frames, nearest_in_order
from cogvideox_sat.media.packet_window import decoding_runs
from cogvideox_sat.media.pyav_container import (
    FFMPEG_ERRORS,
    REORDERED,
    VideoContainer,
    VideoPacket,
    is_shown,
    unreadable,
)
from cogvideox_sat.media.video_facts import DAMAGED, NOT_A_VIDEO, UnreadableClip, VideoFacts

# Codecs whose decoders can skip single frames that no other frame depends on.
SKIPPING = frozenset({"h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4", "vp8", "vp9"})
TINY = 16  # bytes of a packet that only repeats the last frame
LONGEST_WINDOW = 10.0  # seconds between wanted frames; over a longer gap the reader seeks


class Undecodable(Exception):
    """Raised when packets do not contain the wanted frames."""


class Wanted(NamedTuple):
    """Frames that are wanted.

    Attributes:
        times: in seconds from the first frame, ascending.
        ticks: times of the packets whose frames are nearest to `times`.
        tolerance: largest distance in seconds of a frame from its tick, for packets that have no frame of their own.
    """

    times: np.ndarray
    ticks: list[int]
    tolerance: float


class PyavVideo:
    """Video file as a `media.video_reading.Video`.

    Args:
        threads: number of decoding threads; 0: as many as there are cores.
    """

    def __init__(self, file: str | os.PathLike[str] | BinaryIO, threads: int = 1):
        self._container = VideoContainer(file, threads)
        self._pixels = FramePixels(self._container.stream.sample_aspect_ratio, threads)
        self._tick = self._container.tick
        self._rounding = min(max(ROUNDING, 0.6 * self._tick), COARSEST_ROUNDING)

    def close(self) -> None:
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    @cached_property
    def facts(self) -> VideoFacts:
        with unreadable():
            frames, seconds = self._container.length(self._start)
            return VideoFacts(*self._size(), frames, seconds)

    def _size(self) -> tuple[int, int]:
        """Return width and height of the first frame, or the header's if the frame is damaged."""
        codec = self._container.codec
        codec.skip_frame = "DEFAULT"
        tried = 0
        for packet in chain(self._container.from_beginning(), [None]):
            with suppress(*FFMPEG_ERRORS):
                for frame in self._container.stream.decode(packet):
                    return self._pixels.size(frame)
            tried += packet is not None and is_shown(packet)
            if tried > 2 * REORDERED:
                break
        if not (codec.width and codec.height):
            raise UnreadableClip(NOT_A_VIDEO)
        return codec.width, codec.height

    @cached_property
    def _start(self) -> int:
        """Return the time at which the first frame is shown, in ticks."""
        beginning = self._container.beginning
        if beginning.first >= beginning.key:
            return beginning.first
        # The first frame may depend on missing frames: use it only if the decoder returns it.
        frame = next(self._from_beginning(), None)
        return beginning.key if frame is None or frame.pts is None else frame.pts

    # Frames

    def frames_at(self, times: Sequence[float] | np.ndarray, beyond: float | None = None) -> Iterator[np.ndarray]:
        seconds = np.asarray(times, np.float64)
        if not len(seconds):
            return
        with unreadable():
            if not self._container.beginning.timed:
                yield from self._frames_by_rank(seconds, beyond)
                return
            far = np.flatnonzero(np.diff(seconds) > LONGEST_WINDOW) + 1
            for window in np.split(seconds, far):
                yield from self._frames_of_window(window, beyond)

    def all_frames(self) -> Iterator[np.ndarray]:
        with unreadable():
            for frame in self._from_beginning():
                yield self._pixels.convert(frame)

    def _frames_of_window(self, times: np.ndarray, beyond: float | None) -> Iterator[np.ndarray]:
        found = self._container.window(*(self._start + times[[0, -1]] / self._tick))
        if found is None:
            raise UnreadableClip(DAMAGED)
        packets, ended = found
        shown = (packet.pts for packet in packets if packet.pts is not None and is_shown(packet))
        ticks = np.unique([time for time in shown if time >= self._start])
        if not len(ticks):
            raise UnreadableClip(DAMAGED)
        seconds = (ticks - self._start) * self._tick
        if ended:
            _check_end(times, seconds[-1], beyond)
        nearest = nearest_frames(seconds, times, self._rounding)
        interval = float(np.median(np.diff(seconds))) if len(seconds) > 1 else 0.0
        done = 0
        for way in (self._sparsely, self._from_key_frame, self._surely):
            left = slice(done, None)
            wanted = Wanted(times[left], ticks[nearest[left]].tolist(), 1.5 * interval + self._rounding)
            try:
                for pixels in way(packets, wanted):
                    yield pixels
                    done += 1
                return
            except (Undecodable, *FFMPEG_ERRORS):
                continue
        raise UnreadableClip(DAMAGED)

    def _sparsely(self, packets: Sequence[VideoPacket], wanted: Wanted) -> Iterator[np.ndarray]:
        """Yield the wanted frames, decoding only frames that these depend on."""
        left = iter(wanted.ticks)
        time = next(left)
        ticks = frozenset(wanted.ticks)
        for frame in self._decoded(decoding_runs(packets, ticks), ticks):
            if frame.pts is None or frame.pts < time:
                continue
            if frame.pts > time:
                raise Undecodable
            pixels = self._pixels.convert(frame)
            while time == frame.pts:
                yield pixels
                following = next(left, None)
                if following is None:
                    return
                time = following
        raise Undecodable

    def _from_key_frame(self, packets: Sequence[VideoPacket], wanted: Wanted) -> Iterator[np.ndarray]:
        """Yield the wanted frames, decoding everything from the key frame on."""
        yield from self._nearest(self._decoded([packets], None), wanted)

    def _surely(self, _: Sequence[VideoPacket], wanted: Wanted) -> Iterator[np.ndarray]:
        """Yield the wanted frames, decoding everything from the beginning of the file."""
        yield from self._nearest(self._from_beginning(), wanted)

    def _nearest(self, frames: Iterable[VideoFrame], wanted: Wanted) -> Iterator[np.ndarray]:
        """Yield the frames nearest to the wanted times.

        Raises:
            Undecodable: a frame is too far from its packet's time.
        """
        shown = ((frame.pts, frame) for frame in frames if frame.pts is not None)
        timed = (((ticks - self._start) * self._tick, (ticks, frame)) for ticks, frame in shown)
        found = nearest_in_order(
            timed, wanted.times, lambda frame: (frame[0], self._pixels.convert(frame[1])), self._rounding
        )
        count = 0
        for (ticks, pixels), promised in zip(found, wanted.ticks, strict=False):
            if abs(ticks - promised) * self._tick > wanted.tolerance:
                raise Undecodable
            yield pixels
            count += 1
        if count < len(wanted.times):
            raise Undecodable

    def _decoded(self, runs: Iterable[Sequence[VideoPacket]], wanted: frozenset[int] | None) -> Iterator[VideoFrame]:
        """Yield the frames of runs of packets: all, or the `wanted` ones and their references."""
        codec = self._container.codec
        needed = wanted if codec.name in SKIPPING else None
        for run in runs:
            codec.flush_buffers()
            for packet in chain(run, [None]):
                may_skip = needed is not None and packet and packet.pts not in needed
                codec.skip_frame = "NONREF" if may_skip else "DEFAULT"
                yield from self._clean(packet, run[0].pts)

    def _from_beginning(self) -> Iterator[VideoFrame]:
        """Yield every frame that is shown, decoded from the beginning of the file.

        Raises:
            UnreadableClip: a frame is damaged, for another reason than missing references before the file's beginning.
        """
        timed, key, _ = self._container.beginning
        self._container.codec.skip_frame = "DEFAULT"
        for packet in chain(self._container.from_beginning(), [None]):
            try:
                for frame in self._clean(packet, key if timed else None):
                    if frame.pts is not None or not timed:
                        yield frame
            except (Undecodable, *FFMPEG_ERRORS) as error:
                if not (timed and packet and packet.pts is not None and packet.pts < key):
                    raise UnreadableClip(DAMAGED) from error

    def _clean(self, packet: "VideoPacket | None", key: int | None) -> Iterator[VideoFrame]:
        """Yield the frames that the decoder returns for a packet; for None, those it still holds.

        Damaged frames that are shown before the key frame, at the time `key`, are left out: they depend on missing
        frames.

        Raises:
            Undecodable, or one of FFMPEG_ERRORS: a frame is damaged.
        """
        if packet and self._container.is_damaged(packet):
            raise Undecodable
        for frame in self._container.stream.decode(packet):
            if not frame.is_corrupt:
                yield frame
            elif key is None or frame.pts is None or frame.pts >= key:
                raise Undecodable

    def _frames_by_rank(self, times: np.ndarray, beyond: float | None) -> Iterator[np.ndarray]:
        """Yield the frames nearest to `times` by counting frames, if packets have no such times."""
        shown = self._container.times_by_rank
        _check_end(times, float(shown[-1]), beyond)
        wanted = deque(nearest_frames(shown, times, self._rounding).tolist())
        for frame, first, last in self._ranked(len(shown)):
            if wanted[0] < first:
                break
            if wanted[0] > last:
                continue
            pixels = self._pixels.convert(frame)
            while wanted and wanted[0] <= last:
                yield pixels
                wanted.popleft()
            if not wanted:
                return
        raise UnreadableClip(DAMAGED)

    def _ranked(self, count: int) -> Iterator[tuple[VideoFrame, int, int]]:
        """Yield every frame with the first and last of the `count` positions where it is shown.

        These are the same, unless the next packets repeat the frame: MPEG-4 encoders write tiny packets for this, and
        the decoder returns no frame for them.
        """
        sizes = self._container.sizes_by_decoding if self._container.codec.name == "mpeg4" else {}
        places: dict[int | None, int] = {time: place for place, time in enumerate(sizes)}
        stays = [size <= TINY for size in sizes.values()]
        before, first, offset = None, 0, 0
        for frame in self._from_beginning():
            place = places.get(frame.dts)
            if before is None:
                before, offset = frame, place or 0
                continue
            following = first + 1
            while place is not None and following < place - offset and stays[following + offset]:
                following += 1
            yield before, first, following - 1
            before, first = frame, following
        if before is not None:
            yield before, first, count - 1 if sizes and all(stays[first + 1 + offset :]) else first


def _check_end(times: np.ndarray, end: float, beyond: float | None) -> None:
    if beyond is not None and len(times) and times[-1] > end + beyond:
        raise UnreadableClip(f"it ends after {end:.2f} s, before {times[-1]:.2f} s")
