"""Choose the packets of a stream that must be decoded for some of its frames. Nothing here imports PyAV."""

import math
from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar


class TimedPacket(Protocol):
    """The part of `av.Packet` that is used here."""

    pts: int | None
    is_keyframe: bool


AnyPacket = TypeVar("AnyPacket", bound=TimedPacket)


def _time(packet: TimedPacket) -> float:
    """Return when a packet is shown; a packet without a time, which nobody can ask for, sorts before all others."""
    return -math.inf if packet.pts is None else packet.pts


def decoding_runs(packets: Sequence[AnyPacket], wanted: Collection[int]) -> list[list[AnyPacket]]:
    """Return the packets to decode, in runs; before each the decoder starts anew.

    Packets depend on those from the last key frame on. Packets that follow a key frame but are shown before it (open
    groups of pictures) depend on the group before as well, and are left out where that is not decoded.

    Args:
        packets: in the order in which they are decoded, from a key frame on.
        wanted: times of frames that are to be seen.
    """
    wanted = frozenset(wanted)
    starts = [number for number, packet in enumerate(packets) if packet.is_keyframe or not number]
    ends = [*starts[1:], len(packets)]
    until = list(starts)  # of each group, what is needed
    for group, (start, end) in enumerate(zip(starts, ends, strict=True)):
        needed = [number for number in range(start, end) if packets[number].pts in wanted]
        if needed:
            until[group] = needed[-1] + 1
        if group and any(_time(packets[number]) < _time(packets[start]) for number in needed):
            until[group - 1] = start
    runs: list[list[AnyPacket]] = []
    complete = False  # whether the group before is decoded to its end
    for group, (start, end) in enumerate(zip(starts, ends, strict=True)):
        part = packets[start : until[group]]
        if part and complete:
            runs[-1] += part
        elif part:
            first = _time(part[0])
            if group == 0:
                first = min(first, *wanted)  # before it only if this is the beginning of the file
            runs.append([part[0], *(packet for packet in part[1:] if _time(packet) >= first)])
        complete = bool(part) and until[group] == end
    return runs
