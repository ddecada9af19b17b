"""Test that configuration files come after the files they include, all checked."""

import pytest

from cogvideox_sat.configuration.includes import DEEPEST_INCLUDES, read_files
from sgm.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(**files: str) -> str:
        for name, text in files.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return str(tmp_path / f"{next(iter(files))}.yaml")

    return write


def test_what_is_included_comes_first(write, tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below/c.yaml").write_text("include: ../d.yaml\nmodel: {c: 1}\n")
    path = write(a="include: [b.yaml, below/c.yaml]\nargs: {a: 1}\nmodel:\n", b="data: {b: 1}\n", d="model: {d: 1}\n")
    files = read_files([path, str(tmp_path / "b.yaml")])
    assert [file.name for file, _ in files] == ["b.yaml", "d.yaml", "c.yaml", "a.yaml", "b.yaml"]
    assert files[3][1] == {"args": {"a": 1}}


def test_a_file_may_be_included_twice_and_not_by_itself(write):
    path = write(a="include: [b.yaml, c.yaml]\n", b="include: c.yaml\n", c="args: {}\n")
    assert len(read_files([path])) == 4
    with pytest.raises(UserError, match="includes itself"):
        read_files([write(a="include: b.yaml\n", b="include: a.yaml\n")])


def test_chains_have_an_end(write):
    chain = {f"f{number}": f"include: f{number + 1}.yaml\n" for number in range(DEEPEST_INCLUDES + 1)}
    with pytest.raises(UserError, match="more files than"):
        read_files([write(**chain, **{f"f{DEEPEST_INCLUDES + 1}": "args: {}\n"})])


def test_files_that_came_with_something_else_include_nothing(write):
    path = write(a="include: b.yaml\n", b="args: {}\n")
    assert read_files([path])
    with pytest.raises(UserError, match="includes no others"):
        read_files([path], trusted=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "expected sections"),
        ("include: 3\n", "include: got"),
        ("include: ['']\n", "include: got"),
        ("modle: {}\n", "unknown section 'modle'"),
        ("1: {}\n", "unknown section 1"),
        ("args: [1]\n", "the section 'args': got"),
        ("include: missing.yaml\n", "missing.yaml"),
    ],
)
def test_mistakes_name_the_file(write, text, message):
    with pytest.raises(UserError, match=message) as raised:
        read_files([write(a=text)])
    assert ".yaml" in str(raised.value)
