"""Choose the packets of a stream that must be decoded for some of its frames.

Nothing here imports PyAV.
"""

import math
from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar


class TimedPacket(Protocol):
    """The attributes of `av.Packet` that are used here."""

    pts: int | None
    is_keyframe: bool


AnyPacket = TypeVar("AnyPacket", bound=TimedPacket)


def _time(packet: TimedPacket) -> float:
    """Return the time at which a packet is shown; packets without a time sort before others.

    No caller can ask for a frame without a time.
    """
    return -math.inf if packet.pts is None else packet.pts


def decoding_runs(packets: Sequence[AnyPacket], wanted: Collection[int]) -> list[list[AnyPacket]]:
    """Return the packets to decode, in runs; the decoder is reset before each run.

    Packets depend on the packets since the last key frame. Packets that follow a key frame but are shown before it
    (open groups of pictures) also depend on the previous group, and are left out if that group is not decoded.

    Args:
        packets: in decoding order, from a key frame on.
        wanted: times of the wanted frames.
    """
    wanted = frozenset(wanted)
    starts = [number for number, packet in enumerate(packets) if packet.is_keyframe or not number]
    ends = [*starts[1:], len(packets)]
    until = list(starts)  # for each group, the end of the packets that are needed
    for group, (start, end) in enumerate(zip(starts, ends, strict=True)):
        needed = [number for number in range(start, end) if packets[number].pts in wanted]
        if needed:
            until[group] = needed[-1] + 1
        if group and any(_time(packets[number]) < _time(packets[start]) for number in needed):
            until[group - 1] = start
    runs: list[list[AnyPacket]] = []
    complete = False  # the previous group is decoded to its end
    for group, (start, end) in enumerate(zip(starts, ends, strict=True)):
        part = packets[start : until[group]]
        if part and complete:
            runs[-1] += part
        elif part:
            first = _time(part[0])
            if group == 0:
                first = min(first, *wanted)  # earlier frames are complete only at the beginning of the file
            runs.append([part[0], *(packet for packet in part[1:] if _time(packet) >= first)])
        complete = bool(part) and until[group] == end
    return runs
