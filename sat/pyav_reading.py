"""Videos read with PyAV, whose wheels bring FFmpeg.

The frames of a clip are found by their times. The reader seeks to the last key frame before the first of them, looks at
the times of the packets from there, and decodes only those that the wanted frames depend on. What a container says of
its number of frames is not trusted: it counts frames that an edit list hides.

Three ways lead to a frame, each slower and surer than the one before: with packets left out that nothing depends on;
all packets from the key frame on; all from the beginning of the file, for those that mark key frames wrongly. A file is
damaged if the last one fails.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain
from typing import Any, BinaryIO, Self

import av
import numpy as np
from av import Packet, VideoFrame
from av.container import Flags, InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

from frame_pixels import FramePixels
from frame_times import COARSEST_ROUNDING, ROUNDING, nearest_frames, nearest_in_order
from packet_window import decoding_runs
from video_reading import DAMAGED, NOT_A_VIDEO, UnreadableClip, VideoFacts

# Containers of video. Not among them are playlists and the like, which would open other files and addresses.
FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,mpeg1video,mpeg2video,m4v,h264,hevc,obu,ivf,av1,vc1,h263,flv,live_flv,"
    "kux,asf,ogg,mxf,nut,dv,rm,wtv,yuv4mpegpipe,mjpeg,3gp,mj2,gif,swf,vob,dnxhd,nsv,nuv,wc3movie,amv,mve,dhav,ty"
)
MOST_PIXELS = 2**27  # of a frame; a damaged header may ask for any number
REORDERED = 33  # packets: more than any codec decodes between a frame and one that is shown before it
LONGEST_WINDOW = 10.0  # seconds between wanted frames, beyond which the reader seeks rather than reads on
MOST_SKIPPED = 1000  # packets before the first key frame
FAR_BACK = -(2**60)  # a time before the beginning of every file


class PyavVideo:
    """See `video_reading.Video`.

    Args:
        threads: that decode, 0: as many as there are cores.
    """

    def __init__(self, file: str | os.PathLike | BinaryIO, threads: int = 1):
        self._file, self._threads = file, threads
        self._open()

    def _open(self) -> None:
        # With the protocol in front, a colon in the name of a file is only a colon.
        is_path = isinstance(self._file, str | os.PathLike)
        file = f"file:{os.fspath(self._file)}" if is_path else self._file
        if not is_path:
            file.seek(0)
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        try:
            self._container: InputContainer = av.open(file, container_options=options, metadata_errors="ignore")
        except FFmpegError as error:
            missing = isinstance(error, OSError) and not isinstance(error, av.error.EOFError)
            raise UnreadableClip(error.strerror if missing else NOT_A_VIDEO) from error
        except (OSError, ValueError) as error:  # of the Python file
            raise UnreadableClip(str(error)) from error
        # Times that FFmpeg makes up for packets that have none would be wrong for frames that are shown out of order.
        self._container.flags &= ~Flags.gen_pts.value
        self._stream = self._video_stream()
        codec = self._stream.codec_context
        codec.thread_count = self._threads
        codec.options = {"max_pixels": str(MOST_PIXELS)}
        self._pixels = FramePixels(self._stream.sample_aspect_ratio, self._threads)
        self._tick = float(self._stream.time_base)
        self._rounding = min(max(ROUNDING, 0.6 * self._tick), COARSEST_ROUNDING)

    def _video_stream(self) -> VideoStream:
        best = self._container.streams.best("video")
        candidates = [best, *self._container.streams.video] if best else []
        for stream in candidates:
            if not stream.disposition & Disposition.attached_pic and stream.codec_context and stream.time_base:
                return stream
        raise UnreadableClip("it has no video, or in a format that is not known" if candidates else NOT_A_VIDEO)

    def close(self) -> None:
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    # What the file says

    @cached_property
    def facts(self) -> VideoFacts:
        frames, seconds = self._length()
        return VideoFacts(*self._size(), frames, seconds)

    def _size(self) -> tuple[int, int]:
        """Width and height of the first frame; if that is too damaged, as the container says: reading tells it."""
        self._rewind()
        codec = self._stream.codec_context
        codec.skip_frame = "DEFAULT"
        tried = 0
        for packet in chain(self._from_key_frame(), [None]):
            with suppress(FFmpegError):
                for frame in self._stream.decode(packet):
                    return self._pixels.size(frame)
            tried += packet is not None and _is_shown(packet)
            if tried > 2 * REORDERED:
                break
        if not (codec.width and codec.height):
            raise UnreadableClip(NOT_A_VIDEO)
        return codec.width, codec.height

    def _length(self) -> tuple[int, float]:
        """Number of frames, and seconds from the first to the last."""
        if not self._has_times:
            return len(self._times_by_rank), float(self._times_by_rank[-1])
        frames, last = self._length_by_index() or self._length_by_packets()
        return frames, (last - self._start) * self._tick

    def _length_by_index(self) -> tuple[int, int] | None:
        """Number of frames and time of the last; None where the container keeps no index of all packets.

        Raises:
            UnreadableClip: the file is shorter than the index says.
        """
        index = self._stream.index_entries
        if "mp4" not in self._container.format.name or not self._stream.frames or not len(index):  # else: fragments
            return None
        size = self._container.size
        shown, frames, end = 0, 0, 0
        for number, entry in enumerate(index):
            if not entry.is_discard:
                shown, frames = number, frames + 1
            end = max(end, entry.pos + entry.size)
        if end > size:
            raise UnreadableClip(f"cut off: it should have at least {end} bytes and has {size}")
        try:
            self._seek(index[max(shown - 2 * REORDERED, 0)].timestamp, any_frame=True)
            last = max((packet.pts for packet in self._packets() if _is_shown(packet)), default=None)
        except (FFmpegError, TypeError):  # a packet without a time
            return None
        return None if last is None else (frames, last)

    def _length_by_packets(self) -> tuple[int, int]:
        self._rewind()
        times = {packet.pts for packet in self._from_key_frame() if _is_shown(packet) and packet.pts is not None}
        times = {time for time in times if time >= self._start}
        return len(times), max(times)

    @property
    def _has_times(self) -> bool:
        """Whether packets say when their frames are shown; AVI knows only in which order they are decoded."""
        return self._beginning[0]

    @property
    def _start(self) -> int:
        """When the first frame is shown, in ticks."""
        return self._beginning[1]

    @cached_property
    def _beginning(self) -> tuple[bool, int]:
        self._rewind()
        head, shown = [], []
        for packet in self._from_key_frame():
            head.append(packet)
            if _is_shown(packet):
                shown.append(packet.pts)
            if len(shown) == REORDERED:
                break
        if not shown:
            raise UnreadableClip(NOT_A_VIDEO)
        if None in shown:
            return False, 0
        first = min(shown)
        if first < head[0].pts and not head[0].is_discard:
            # Shown before the key frame, so they may depend on what is not in the file: does the decoder show them?
            frame = next(self._from_the_beginning(), None)
            first = head[0].pts if frame is None or frame.pts is None else frame.pts
        return True, first

    @cached_property
    def _times_by_rank(self) -> np.ndarray:
        """When frames are shown, in seconds from the first, where packets do not say it: the n-th has the n-th time."""
        self._rewind()
        times = [packet.dts for packet in self._from_key_frame() if _is_shown(packet)]
        if None in times or len(set(times)) < len(times):
            rate = self._stream.average_rate or self._stream.guessed_rate
            if not rate:
                raise UnreadableClip("it has neither time stamps nor a frame rate")
            return np.arange(len(times)) / float(rate)
        return (np.sort(times) - min(times)) * self._tick

    # Packets

    def _packets(self) -> Iterator[Packet]:
        """Packets from where the file is read, those of no content left out."""
        return (packet for packet in self._container.demux(self._stream) if packet.size)

    def _from_key_frame(self) -> Iterator[Packet]:
        """Packets from the next key frame on; from here on, if none is marked as one for long."""
        before = []
        packets = self._packets()
        for packet in packets:
            if packet.is_keyframe:
                yield packet
                yield from packets
                return
            before.append(packet)
            if len(before) == MOST_SKIPPED:
                break
        yield from before
        yield from packets

    def _seek(self, ticks: int, any_frame: bool = False) -> None:
        self._container.seek(ticks, stream=self._stream, any_frame=any_frame)

    def _rewind(self) -> None:
        try:
            self._seek(FAR_BACK)
        except FFmpegError:  # a container that cannot be sought in
            self.close()
            self._open()

    def _window(self, first: float, last: float) -> tuple[list[Packet], bool]:
        """Packets from the key frame before the time `first` to behind the time `last`, both in ticks, and whether the
        stream ends there.

        Seeking takes some containers to a later key frame than was asked for; then it is tried further back.
        """
        back, ticks, beginning = 1.0, math.floor(first), self._start - 1 / self._tick
        while True:
            try:
                self._seek(max(ticks, FAR_BACK))
            except FFmpegError:
                self._rewind()
            packets, behind, soonest = [], 0, math.inf
            ended = True
            for packet in self._from_key_frame():
                if packet.pts is None:
                    raise _Undecodable
                if not packets and packet.pts > first and ticks >= beginning:
                    break
                packets.append(packet)
                if packet.pts > last and _is_shown(packet):
                    behind, soonest = behind + 1, min(soonest, packet.pts)
                if behind == REORDERED or (packet.dts is not None and packet.dts > soonest):
                    ended = False
                    break
            if packets:
                return packets, ended
            if ticks < beginning:
                raise _Undecodable
            ticks = min(ticks, math.floor(first)) - math.ceil(back / self._tick)
            back *= 4

    # Frames

    def frames_at(self, times: Sequence[float], beyond: float | None = None) -> Iterator[np.ndarray]:
        times = np.asarray(times, np.float64)
        try:
            if not self._has_times:
                yield from self._frames_by_rank(times, beyond)
                return
            far = np.flatnonzero(np.diff(times) > LONGEST_WINDOW) + 1
            for window in np.split(times, far):
                yield from self._frames_of_window(window, beyond)
        except FFmpegError as error:
            raise UnreadableClip(DAMAGED) from error

    def all_frames(self) -> Iterator[np.ndarray]:
        for frame in self._from_the_beginning():
            yield self._pixels.convert(frame)

    def _frames_of_window(self, times: np.ndarray, beyond: float | None) -> Iterator[np.ndarray]:
        try:
            packets, ended = self._window(*(self._start + times[[0, -1]] / self._tick))
        except _Undecodable as error:
            raise UnreadableClip(DAMAGED) from error
        ticks = np.unique([packet.pts for packet in packets if _is_shown(packet) and packet.pts >= self._start])
        if not len(ticks):
            raise UnreadableClip(DAMAGED)
        shown = (ticks - self._start) * self._tick
        if ended and beyond is not None and times[-1] > shown[-1] + beyond:
            raise UnreadableClip(f"it ends after {shown[-1]:.2f} s, before {times[-1]:.2f} s")
        chosen = ticks[nearest_frames(shown, times, self._rounding)].tolist()
        done = 0
        for sparse in (True, False):
            try:
                for frame in self._chosen(packets, chosen[done:], sparse):
                    yield frame
                    done += 1
                return
            except (_Undecodable, FFmpegError):
                continue
        interval = float(np.median(np.diff(shown))) if len(shown) > 1 else 0.0
        expected = (np.asarray(chosen) - self._start) * self._tick
        yield from self._surely(times[done:], expected[done:], 1.5 * interval + self._rounding)

    def _chosen(self, packets: Sequence[Packet], chosen: Sequence[int], sparse: bool) -> Iterator[np.ndarray]:
        """The frames with the times `chosen`, ascending; a time may be there several times.

        Raises:
            _Undecodable: one is damaged or missing.
        """
        wanted = frozenset(chosen)
        runs = decoding_runs(packets, wanted)
        if not sparse:
            last = max(number for number, packet in enumerate(packets) if packet.pts in wanted)
            runs = [packets[: last + 1]]
        left = iter(chosen)
        time = next(left)
        for frame in self._decoded(runs, wanted if sparse else None):
            if frame.pts is None or frame.pts > time:
                raise _Undecodable
            if frame.pts < time:
                continue
            pixels = self._pixels.convert(frame)
            while time == frame.pts:
                yield pixels
                time = next(left, None)
            if time is None:
                return
        raise _Undecodable

    def _decoded(self, runs: Iterable[Sequence[Packet]], wanted: frozenset[int] | None) -> Iterator[VideoFrame]:
        """The frames of runs of packets; if `wanted` is given, at least those, and others that they depend on."""
        codec = self._stream.codec_context
        for run in runs:
            codec.flush_buffers()
            for packet in chain(run, [None]):
                skip = packet is not None and wanted is not None and packet.pts not in wanted
                codec.skip_frame = "NONREF" if skip else "DEFAULT"
                for frame in self._stream.decode(packet):
                    if frame.pts is None or frame.pts >= run[0].pts:
                        if frame.is_corrupt:
                            raise _Undecodable
                        yield frame
                    elif not frame.is_corrupt:
                        yield frame

    def _from_the_beginning(self) -> Iterator[VideoFrame]:
        """Every frame that is shown, decoded from the beginning of the file.

        Raises:
            UnreadableClip: one is damaged, other than by depending on what is not in the file.
        """
        self._rewind()
        codec = self._stream.codec_context
        codec.skip_frame = "DEFAULT"
        key = None
        for packet in chain(self._from_key_frame(), [None]):
            if key is None and packet is not None:
                key = packet.pts
            incomplete = packet is not None and key is not None and packet.pts is not None and packet.pts < key
            try:
                frames = self._stream.decode(packet)
            except FFmpegError as error:
                if not incomplete:
                    raise UnreadableClip(DAMAGED) from error
                continue
            for frame in frames:
                if not frame.is_corrupt:
                    yield frame
                elif key is None or frame.pts is None or frame.pts >= key:
                    raise UnreadableClip(DAMAGED)

    def _surely(self, times: np.ndarray, expected: np.ndarray, tolerance: float) -> Iterator[np.ndarray]:
        """The frames nearest to `times`, with everything decoded from the beginning of the file.

        Raises:
            UnreadableClip: one is further from the time at which a packet promised it than `tolerance`, in seconds.
        """
        frames = (((f.pts - self._start) * self._tick, f) for f in self._from_the_beginning() if f.pts is not None)
        found = nearest_in_order(frames, times, lambda frame: (frame.pts, self._pixels.convert(frame)), self._rounding)
        count = 0
        for (ticks, pixels), time in zip(found, expected, strict=False):
            if abs((ticks - self._start) * self._tick - time) > tolerance:
                break
            yield pixels
            count += 1
        if count < len(times):
            raise UnreadableClip(DAMAGED)

    def _frames_by_rank(self, times: np.ndarray, beyond: float | None) -> Iterator[np.ndarray]:
        """The frames nearest to `times` where packets do not say when they are shown: counted from the beginning."""
        shown = self._times_by_rank
        if beyond is not None and len(times) and times[-1] > shown[-1] + beyond:
            raise UnreadableClip(f"it ends after {shown[-1]:.2f} s, before {times[-1]:.2f} s")
        ranks = iter(nearest_frames(shown, times, self._rounding).tolist())
        rank = next(ranks, None)
        for number, frame in enumerate(self._from_the_beginning()):
            if number == rank:
                pixels = self._pixels.convert(frame)
            while number == rank:
                yield pixels
                rank = next(ranks, None)
            if rank is None:
                return
        raise UnreadableClip(DAMAGED)


class _Undecodable(Exception):
    """The packets at hand do not give the frames that are wanted."""


def _is_shown(packet: Packet) -> bool:
    """Whether a packet has a frame that is shown: not one that an edit list hides, or that VP8 only refers to."""
    if packet.is_discard:
        return False
    return packet.stream.codec_context.name != "vp8" or bool(bytes(packet)[0] & 16)
