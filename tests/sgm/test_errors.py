"""Messages are one line of a bearable length, whatever values are in them."""

import pytest

from sgm.errors import one_line, printable, shown, some


@pytest.mark.parametrize(
    ("names", "text"), [([], ""), (["a"], "a"), ("abc", "a, b, c"), (range(5), "0, 1, 2 ... and 2 more")]
)
def test_the_first_few_names(names, text):
    assert some(names) == text


def test_values_are_cut_where_they_are_long():
    assert shown("a\n") == r"'a\n'"
    assert len(shown("x" * 1000)) == len(shown({str(n): "y" * 50 for n in range(1000)})) == 80
    assert shown("x" * 1000).endswith(" ...")


@pytest.mark.parametrize(
    ("text", "line"), [("plain ä", "plain ä"), ("a\nb", r"a\nb"), ("a\x1b[0m", r"a\x1b[0m"), ("\udcff", r"\udcff")]
)
def test_names_of_files_can_be_written(text, line):
    assert printable(text) == line
    printable(text).encode("utf-8")


def test_a_message_is_one_line():
    assert one_line("a\nb\x07") == r"a b\x07"
    assert one_line("x" * 3000) == "x" * 2000 + " ..."
