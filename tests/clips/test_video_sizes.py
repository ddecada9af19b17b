"""Test that a clip gets the size nearest in shape that need not enlarge it, if possible."""

import pytest

from cogvideox_sat.clips.video_sizes import nearest_size, parse_sizes
from sgm.errors import UserError

SIZES = [(480, 720), (720, 480), (272, 400), (480, 480)]


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((1080, 1620), (480, 720)),
        ((1620, 1080), (720, 480)),
        ((479, 719), (272, 400)),  # a larger one would enlarge it; 272 x 400 is the same shape, rounded to 16
        ((100, 150), (272, 400)),  # all enlarge it: the smallest of its shape
        ((600, 640), (480, 480)),
    ],
)
def test_the_nearest_size(source, size):
    assert nearest_size(*source, SIZES) == size
    assert nearest_size(*source, SIZES[::-1]) == size


def test_one_size_or_several():
    assert parse_sizes([480, 720]) == [(480, 720)]
    assert parse_sizes([[480, 720], (272, 400)]) == [(480, 720), (272, 400)]


@pytest.mark.parametrize(
    "value", [None, 480, [], [[]], [480], [480, 720, 3], [480, 721], [-480, 720], [0, 720], [480.0, 720], [True, 16]]
)
def test_other_values_are_refused(value):
    with pytest.raises(UserError, match="data: video_size: got"):
        parse_sizes(value)
