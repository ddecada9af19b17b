"""The keywords that a function takes are found."""

import functools

import pytest

from sgm.signatures import accepts


def named(x, drop=True): ...
def keyword_only(x, *, drop): ...
def any_keywords(x, **kwargs): ...
def other(x, keep=True): ...
def positional_only(drop, /): ...
def many(*drop): ...


@pytest.mark.parametrize("function", [named, keyword_only, any_keywords, functools.partial(named, 1)])
def test_what_takes_it(function):
    assert accepts(function, "drop")


@pytest.mark.parametrize("function", [other, positional_only, many, functools.partial(other, 1)])
def test_what_does_not(function):
    assert not accepts(function, "drop")
