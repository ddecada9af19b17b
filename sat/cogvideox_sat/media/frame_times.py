"""Find the frames nearest to given times."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

ROUNDING = 1e-4  # seconds, or frames: times in files are rounded, and decord's are float32
COARSEST_ROUNDING = 6e-4  # seconds; Matroska rounds times to milliseconds

Frame = TypeVar("Frame")
Pixels = TypeVar("Pixels")


def nearest_frames(source_times: np.ndarray, times: np.ndarray, rounding: float = ROUNDING) -> np.ndarray:
    """Return the indices of the `source_times` that are nearest to `times`.

    `source_times` are in ascending order. If two are equally near, the earlier one is chosen.
    """
    return np.searchsorted((source_times[1:] + source_times[:-1]) / 2, times - rounding)


def nearest_in_order(
    frames: Iterable[tuple[float, Frame]],
    times: Iterable[float],
    convert: Callable[[Frame], Pixels],
    rounding: float = ROUNDING,
) -> Iterator[Pixels]:
    """Yield the converted frame nearest to each of `times`; both are in ascending order.

    No more frames are read than necessary, and frames that are not chosen are not converted. Times after the last frame
    get the last frame. If there are no frames, nothing is yielded.
    """
    frames = iter(frames)
    earlier = next(frames, None)
    later = next(frames, None)
    if earlier is None:
        return
    converted: tuple[tuple[float, Frame], Pixels] | None = None
    for time in times:
        while later is not None and time - rounding > (earlier[0] + later[0]) / 2:
            earlier, later = later, next(frames, None)
        if converted is None or converted[0] is not earlier:
            converted = earlier, convert(earlier[1])
        yield converted[1]
