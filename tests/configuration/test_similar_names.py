"""Test that an unknown name gets the most similar known name as advice."""

import pytest

from cogvideox_sat.configuration.similar_names import nearest

KNOWN = ("train_data", "valid_data", "seed")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("trian_data", {}, "; did you mean train_data?"),
        ("sede", {"prefix": "--"}, "; did you mean --seed?"),
        ("xyzzy", {}, "; --help lists them all"),
        ("xyzzy", {"otherwise": ""}, ""),
        ("seek_and_send", {"otherwise": "", "least": 0.8}, ""),
    ],
)
def test_the_end_of_a_message(name, options, expected):
    assert nearest(name, KNOWN, **options) == expected
