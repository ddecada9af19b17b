"""Open the container of a video with PyAV, and read the times of frames without decoding.

The number of frames in a container's header is not used, since it includes frames that an edit list hides.
"""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from typing import BinaryIO, NamedTuple, TypeAlias

import av
import numpy as np
from av import Packet
from av.container import Flags
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

from cogvideox_sat.media.video_facts import DAMAGED, NOT_A_VIDEO, UnreadableClip

VideoPacket: TypeAlias = "Packet[VideoStream]"  # a string, since the class cannot be subscripted at run time
FFMPEG_ERRORS = (FFmpegError, MemoryError)  # a damaged header may ask for any amount of memory
# Containers of video. Playlists and similar formats are left out, since they open other files and addresses.
FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,obu,ivf,av1,vc1,h263,flv,live_flv,kux,asf,asf_o,"
    "ogg,mxf,nut,dv,rm,wtv,yuv4mpegpipe,mjpeg,mjpeg_2000,swf,dnxhd,dirac,cavsvideo,nsv,nuv,amv,bink,smk,roq,flic,gxf"
)
MOST_PIXELS = 2**27  # pixels of a frame; a damaged header may ask for any number
REORDERED = 33  # packets; more than any codec decodes between a frame and a frame that is shown before it
BEFORE_JOINT = 2  # packets
MOST_SKIPPED = 1000  # packets before the first key frame
# Seconds between packets of a transport stream; FFmpeg treats a longer step as a jump.
LONGEST_STEP, LONGEST_STEP_BACK = 10.0, -0.2
FAR_BACK = -(2**60)  # a time before the beginning of every file


class Beginning(NamedTuple):
    """Beginning of a stream.

    Attributes:
        timed: packets have the times at which their frames are shown. In AVI they may only have the times of decoding.
        key: time of the first key frame.
        first: time of the first frame that is shown; if this is before `key`, the frame may depend on missing frames.
    """

    timed: bool
    key: int
    first: int


class VideoContainer:
    """Video stream of a file; times are in ticks of `tick` seconds.

    Args:
        threads: number of decoding threads; 0: as many as there are cores.

    Raises:
        UnreadableClip: the file is missing, or has no video that can be decoded.
    """

    def __init__(self, file: str | os.PathLike[str] | BinaryIO, threads: int):
        self._file, self._threads = file, threads
        self.at_joints: set[int | None] = set()  # positions of packets in the file
        self._open()

    def _open(self) -> None:
        file: str | BinaryIO
        if isinstance(self._file, str | os.PathLike):
            # With this prefix, a colon in the name of the file is not taken for the end of a protocol.
            file = f"file:{os.fspath(self._file)}"
        else:
            file = self._file
            file.seek(0)
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        with unreadable(NOT_A_VIDEO):
            self.container = av.open(file, "r", container_options=options, metadata_errors="ignore")
        # FFmpeg would invent times for packets without times, which are wrong for frames that are shown out of order.
        self.container.flags &= ~Flags.gen_pts.value  # type: ignore[operator]  # PyAV's types expect a flag instead of a number
        self.stream, self.tick = self._video_stream()
        self.codec = self.stream.codec_context
        self.codec.thread_count = self._threads
        self.codec.options = {"max_pixels": str(MOST_PIXELS)}
        self._in_avi_index = len(self.stream.index_entries) if self.container.format.name == "avi" else 0

    def _video_stream(self) -> tuple[VideoStream, float]:
        """Return the best stream that can be decoded, and the seconds of a tick of its times."""
        best = self.container.streams.best("video")
        candidates = [
            stream
            for stream in ([best, *self.container.streams.video] if best else [])
            if not stream.disposition & Disposition.attached_pic
        ]
        for stream in candidates:
            if isinstance(stream, VideoStream) and stream.codec_context is not None and stream.time_base:
                return stream, float(stream.time_base)
        raise UnreadableClip("its video has a format that is not known" if candidates else NOT_A_VIDEO)

    def close(self) -> None:
        self.container.close()

    # Packets

    def packets(self) -> Iterator[VideoPacket]:
        """Yield the packets from the current position, except empty ones."""
        packets = (packet for packet in self.container.demux(self.stream) if packet.size)
        return self._noting_joints(packets) if self.container.format.name == "mpegts" else packets

    def _noting_joints(self, packets: Iterable[VideoPacket]) -> Iterator[VideoPacket]:
        """Yield packets and record those that FFmpeg wrongly reports as corrupt at a joint.

        Where transport streams were concatenated, their counters break, and FFmpeg reports a packet before the next key
        frame as corrupt, although no data is missing. If data is missing, the decoder reports it.
        """
        waiting: deque[VideoPacket] = deque()
        for packet in packets:
            if packet.is_keyframe:
                self.at_joints.update(before.pos for before in waiting if before.is_corrupt)
            waiting.append(packet)
            if len(waiting) > BEFORE_JOINT:
                yield waiting.popleft()
        yield from waiting

    def is_damaged(self, packet: VideoPacket) -> bool:
        """Return whether a packet is known to be damaged."""
        return packet.is_corrupt and packet.pos not in self.at_joints

    def from_key_frame(self) -> Iterator[VideoPacket]:
        """Yield the packets from the next key frame on.

        If no packet is marked as a key frame for long, yield the packets from the current position.
        """
        before = []
        packets = self.packets()
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

    def from_beginning(self) -> Iterator[VideoPacket]:
        """Yield all packets from the first key frame on."""
        try:
            self.seek(FAR_BACK)
        except FFmpegError:  # the container does not support seeking
            self.close()
            self._open()
        return self.from_key_frame()

    def seek(self, ticks: int, any_frame: bool = False) -> None:
        """Continue reading at the last key frame, or any frame, before a time.

        Raises:
            FFmpegError: the container does not support it.
        """
        self.container.seek(max(ticks, FAR_BACK), stream=self.stream, any_frame=any_frame)

    def window(self, first: float, last: float) -> tuple[list[VideoPacket], bool] | None:
        """Return the packets around a range of times, and whether the stream ends in it.

        The packets are those from the last key frame before the time `first` to behind the time `last`. The result is
        None if there are no such packets. If seeking leads to a later key frame than requested, as in some containers,
        an earlier time is tried.
        """
        back, ticks, beginning = 1.0, math.floor(first), self.beginning.first - 1 / self.tick
        while True:
            try:
                self.seek(ticks)
                packets = self.from_key_frame()
            except FFmpegError:
                packets, ticks = self.from_beginning(), FAR_BACK
            found: list[VideoPacket] = []
            behind, soonest, ended = 0, math.inf, True
            for packet in packets:
                if not found and (packet.pts is None or packet.pts > first) and ticks >= beginning:
                    break
                found.append(packet)
                if packet.pts is not None and packet.pts > last and is_shown(packet):
                    behind, soonest = behind + 1, min(soonest, packet.pts)
                if behind == REORDERED or (packet.dts is not None and packet.dts > soonest):
                    ended = False
                    break
            if found or ticks < beginning:
                return (found, ended) if found else None
            ticks -= math.ceil(back / self.tick)
            back *= 4

    # Times

    @cached_property
    def beginning(self) -> Beginning:
        """Return the beginning of the stream.

        Raises:
            UnreadableClip: the stream has no frames.
        """
        key = None
        shown: list[int | None] = []
        for packet in self.from_beginning():
            key = key or packet
            # Packets without a time right after the first one hold frames from before a cut.
            if is_shown(packet) and (packet.pts is not None or len(shown) != 1):
                shown.append(packet.pts)
            if len(shown) == REORDERED:
                break
        if key is None or not shown:
            raise UnreadableClip(NOT_A_VIDEO)
        times = [time for time in shown if time is not None]
        if len(times) < len(shown) or key.pts is None:
            return Beginning(False, 0, 0)
        first = min(times)
        # A hidden key frame exists only because other frames depend on it.
        return Beginning(True, first if key.is_discard else key.pts, first)

    def length(self, start: int) -> tuple[int, float]:
        """Return the number of frames, and the seconds from the first to the last.

        Args:
            start: time at which the first frame is shown.

        Raises:
            UnreadableClip: the file is shorter than its header says.
        """
        if not self.beginning.timed:
            return len(self.times_by_rank), float(self.times_by_rank[-1])
        frames, last = self._length_by_index() or self._length_by_packets(start)
        return frames, (last - start) * self.tick

    def _length_by_index(self) -> tuple[int, int] | None:
        """Return the number of frames and the last one's time; None without an index of packets."""
        index = self.stream.index_entries
        # Fragmented files have no index.
        if "mp4" not in self.container.format.name or not self.stream.frames or not len(index):
            return None
        size = self.container.size
        shown, frames, end = 0, 0, 0
        for number, entry in enumerate(index):
            if not entry.is_discard:
                shown, frames = number, frames + 1
            end = max(end, entry.pos + entry.size)
        if end > size:
            raise UnreadableClip(f"cut off: it should have at least {end} bytes and has {size}")
        try:
            self.seek(index[max(shown - 2 * REORDERED, 0)].timestamp, any_frame=True)
            times = [packet.pts for packet in self.packets() if packet.pts is not None and is_shown(packet)]
        except FFmpegError:
            return None
        return (frames, max(times)) if times else None

    def _length_by_packets(self, start: int) -> tuple[int, int]:
        packets = list(self._shown_packets())
        if self.container.format.name == "mpegts":
            self._check_steps([decoded for _, decoded in packets if decoded is not None])
        times = {time for time, _ in packets if time is not None and time >= start}
        return len(times), max(times, default=start)

    def _check_steps(self, times: Sequence[int]) -> None:
        """Check that decoding times increase steadily, since players handle jumps differently."""
        for earlier, later in pairwise(times):
            if not LONGEST_STEP_BACK <= (later - earlier) * self.tick <= LONGEST_STEP:
                raise UnreadableClip(
                    f"its time stamps jump by {(later - earlier) * self.tick:.2f} s, as in concatenated streams; "
                    "ffmpeg -i OLD -c copy NEW.mp4 repairs the file"
                )

    def _shown_packets(self) -> Iterator[tuple[int | None, int | None]]:
        """Yield the times of showing and decoding of each packet whose frame is shown."""
        count = 0
        for packet in self.from_beginning():
            count += 1
            if is_shown(packet):
                yield packet.pts, packet.dts
        if count < self._in_avi_index:
            raise UnreadableClip(f"damaged: {self._in_avi_index - count} of {self._in_avi_index} frames are missing")

    @cached_property
    def times_by_rank(self) -> np.ndarray:
        """Return the times of frames, in seconds from the first, if only decoding times are known.

        The n-th frame is shown when the decoder, which delays a few frames, returns it.
        """
        packets = list(self._shown_packets())
        decoded = {time for _, time in packets if time is not None}
        if len(decoded) < len(packets):
            rate = self.stream.average_rate or self.stream.guessed_rate
            if not rate:
                raise UnreadableClip("it has neither time stamps nor a frame rate")
            return np.arange(len(packets)) / float(rate)
        times = np.sort(np.array([*decoded])) * self.tick
        held = min(self.codec.reorder_depth, len(times) - 1)
        regular = held if held < len(times) - 1 else 0
        interval = (times[-1] - times[regular]) / max(len(times) - 1 - regular, 1)
        return np.append(times[held:], times[-1] + interval * np.arange(1, held + 1)) - times[held]

    @cached_property
    def sizes_by_decoding(self) -> dict[int, int]:
        """Return the bytes of packets by decoding time, ascending; empty if a time is not known."""
        packets = [(packet.dts, packet.size) for packet in self.from_beginning() if is_shown(packet)]
        sizes = {decoded: size for decoded, size in packets if decoded is not None}
        return {} if len(sizes) < len(packets) else dict(sorted(sizes.items()))


@contextmanager
def unreadable(reason: str = DAMAGED) -> Iterator[None]:
    """Raise FFmpeg's errors as `UnreadableClip` with this reason, or the operating system's."""
    try:
        yield
    except FFMPEG_ERRORS as error:
        if isinstance(error, OSError) and not isinstance(error, av.error.EOFError):
            reason = error.strerror or reason
        raise UnreadableClip(reason) from error


def is_shown(packet: VideoPacket) -> bool:
    """Return whether a packet's frame is shown: not hidden by an edit list or by VP8."""
    if packet.is_discard:
        return False
    return packet.stream.codec_context.name != "vp8" or bool(memoryview(packet)[0] & 16)
