"""JSON of any author is read, or refused by one kind of error."""

import json

import pytest

from sgm.plain_json import has_half_characters, parse_json, standard_json


def test_json_is_read():
    assert parse_json('{"a": [1, null]}') == parse_json(b'{"a": [1, null]}') == {"a": [1, None]}


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "1" * 10_000, "nope"], ids=lambda text: text[:4])
def test_anything_else_is_one_kind_of_error(text):
    with pytest.raises(json.JSONDecodeError):
        parse_json(text)


def test_bytes_that_are_no_text():
    with pytest.raises(UnicodeDecodeError):
        parse_json(b'"\xff"')


def test_halves_of_characters_are_seen():
    assert has_half_characters(parse_json('"\\ud83d"'))
    assert not has_half_characters(parse_json('"\\ud83d\\ude00"'))


def test_numbers_that_json_lacks_are_written_as_null():
    text = standard_json({"psnr": [float("inf"), -float("inf"), 1.5], "loss": (float("nan"), True), "name": "inf"})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "psnr": [None, None, 1.5],
        "loss": [None, True],
        "name": "inf",
    }
    assert text.endswith("}\n")
