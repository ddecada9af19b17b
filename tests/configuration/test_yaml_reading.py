"""Test that a YAML file is read as plain values, or refused with file and line."""

import time

import pytest

from cogvideox_sat.configuration.yaml_reading import MOST_BYTES, parse_yaml, read_yaml, value_at
from sgm.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-3", {"a": 0.001}),
        ("a: -2E+5", {"a": -200000.0}),
        ("a: 2024-01-31", {"a": "2024-01-31"}),
        ("a: .inf", {"a": float("inf")}),
        ("a: e5", {"a": "e5"}),
        ("7: b", {7: "b"}),
        ("a: &x {b: 1}\nc: {<<: *x, d: 2}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
        ("a: &x {b: 1}\nc: {<<: *x, b: 2}", {"a": {"b": 1}, "c": {"b": 2}}),
        ("", None),
        ("\ufeffa: 1", {"a": 1}),
    ],
)
def test_plain_values(text, value):
    assert parse_yaml(text, "x") == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is given twice"),
        ("a: 1\nyes: 2", "line 2: the key 'yes' is not a text"),
        ("? [1, 2]\n: 3", "line 1: the key a list or a mapping is not a text"),
        ("1.5: 3", "the key '1.5' is not a text"),
        ("a: .nan", "line 1: .nan is not a number"),
        ("a: !!binary aGk=", "a value of the type 'binary'"),
        ("a: !!timestamp 2024-01-31", "a value of the type 'timestamp'"),
        ("a: !!set {b}", "a value of the type 'set'"),
        ("a: !!omap [b: 1]", "a value of the type 'omap'"),
        ("a: !!python/object/apply:os.system [touch canary]", "a value of the type 'python/object/apply:os.system'"),
        ("a: !mine 3", "a value of the type '!mine'"),
        ("a: !!int abc", "'abc' is not a value of the type 'int'"),
        ("a: !!bool 7", "'7' is not a value of the type 'bool'"),
        ("a: " + "9" * 5000, "a whole number of 5000 digits"),
        ('a: "b\\0c"', "a text with NUL or half"),
        ('a: "b\\ud800c"', "not valid YAML"),
        ("a: &x [*x]", "line 1"),
        ("a: [" * 5000, "nest"),
        ("a: " + "[" * 70 + "]" * 70, "nested deeper than 64 levels"),
        ("".join(f"{'  ' * depth}a:\n" for depth in range(100)), "nested deeper than 64 levels"),
        ("a: b: c", "line 1: not valid YAML"),
        ("a: *nothing", "not valid YAML"),
        ("--- 1\n--- 2", "not valid YAML"),
        ("a: \x07", "not valid YAML"),
    ],
)
def test_what_is_refused(text, says):
    with pytest.raises(UserError, match=r"^settings") as error:
        parse_yaml(text, "settings")
    assert says in str(error.value)


@pytest.mark.parametrize("merge", [False, True])
def test_aliases_that_write_out_to_billions_are_refused_at_once(merge):
    lines = ["a0: &a0 {k: 1}"]
    for level in range(12):
        names = ", ".join([f"*a{level}"] * 10)
        lines.append(f"a{level + 1}: &a{level + 1} " + (f"{{<<: [{names}]}}" if merge else f"[{names}]"))
    started = time.monotonic()
    with pytest.raises(UserError, match="values once its aliases are expanded"):
        parse_yaml("\n".join(lines), "bomb")
    assert time.monotonic() - started < 2


def test_a_file_that_is_too_large_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "large.yaml"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES * 1000)  # a hole, which takes no space
    with pytest.raises(UserError, match=r"large\.yaml: larger than 4 MiB"):
        read_yaml(path)


def test_many_values_are_refused_before_they_are_built(tmp_path):
    started = time.monotonic()
    with pytest.raises(UserError, match="more than 200000 values"):
        parse_yaml("a: [" + "1," * 1_000_000 + "]", "x")
    assert time.monotonic() - started < 5


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(UserError, match=r"latin\.yaml is not UTF-8 text"):
        read_yaml(tmp_path / "latin.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        read_yaml(tmp_path)
    with pytest.raises(UserError, match="File name too long"):
        read_yaml(tmp_path / ("a" * 300))


def test_a_value_in_nested_mappings():
    content = {"model": {"params": {"r": 4}, "empty": None}}
    assert value_at(content, "model", "params", "r") == 4 and value_at(content) is content
    for keys in (("args", "load"), ("model", "empty", "r"), ("model", "params", "r", "more")):
        assert value_at(content, *keys) is None
    assert value_at([1], "model") is None
