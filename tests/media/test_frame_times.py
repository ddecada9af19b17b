"""Test the nearest frame in a list, and in a stream that is read no further than needed."""

import numpy as np
import pytest

from cogvideox_sat.media.frame_times import COARSEST_ROUNDING, nearest_frames, nearest_in_order


def test_the_earlier_of_two_equally_near_frames_is_taken_in_spite_of_rounded_times():
    times = np.arange(6, dtype=np.float32) / 30
    assert nearest_frames(times.astype(np.float64), np.arange(4) / 20).tolist() == [0, 1, 3, 4]  # at 0, 1.5, 3, 4.5
    assert nearest_frames(np.zeros(1), np.array([0.0, 9.0])).tolist() == [0, 0]


def test_milliseconds_are_no_reason_to_take_the_later_one():
    exact = np.arange(60) / 30
    places = np.arange(0, 59, 1.5)
    milliseconds = np.round(exact, 3)
    expected = nearest_frames(exact, places / 30)
    assert nearest_frames(milliseconds, places / 30, COARSEST_ROUNDING).tolist() == expected.tolist()


@pytest.mark.parametrize("wanted", [[0.0, 0.04, 0.06, 0.31], [0.05, 0.05, 0.2], [0.9, 5.0]])
def test_in_a_stream_the_same_frames_are_found(wanted):
    times = np.array([0, 0.1, 0.15, 0.3, 1.0])
    taken, converted = [], []

    def frames():
        for number, time in enumerate(times):
            taken.append(number)
            yield time, number

    def convert(number):
        converted.append(number)
        return number

    found = list(nearest_in_order(frames(), wanted, convert))
    assert found == nearest_frames(times, np.array(wanted)).tolist()
    assert converted == sorted(set(found))
    assert len(taken) <= found[-1] + 2  # one more frame is read, to know that it is not nearer


def test_of_no_frames_none_is_the_nearest():
    assert list(nearest_in_order([], [0.0, 1.0], lambda frame: frame)) == []
