"""The docstrings follow the rules of prose, and a violation is found."""

import subprocess
import sys

import pytest

from prose import ROOT, problem_of, wrong

CLEAN = '"""Return the sum.\n\nWhat it is for, and how it is used."""\n'


@pytest.mark.long  # tests/run.sh checks the tree too, by the command
def test_docstrings_of_the_tree():
    assert wrong() == []


@pytest.fixture
def tree(tmp_path):
    """Return a tree of one module with clean docstrings."""
    (tmp_path / "sgm").mkdir()
    (tmp_path / "sgm" / "sums.py").write_text(f"{CLEAN}\n\nclass Sum:\n    {CLEAN}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("docstring", "problem"),
    [
        ("What the sum is.", "begins with 'What'; name the result"),
        ("The one sum.", "begins with 'The one'"),
        ("Raises UserError unless it is a sum.", "begins with 'Raises'"),
        (f"Return {'a' * 88}.", "has 96 characters; shorten it to at most 88"),
        ("Return the sum of two numbers\n    or of more.", "does not end with a period"),
    ],
)
def test_a_violation_is_found(tree, docstring, problem):
    assert wrong(tree) == []
    (tree / "sgm/more.py").write_text(f'def f():\n    """{docstring}"""\n')
    (line,) = wrong(tree)
    assert line.startswith("sgm/more.py:2: ") and problem in line


def test_words_that_only_begin_alike():
    assert problem_of("Whatever the sum is, return it.") is None
    assert problem_of("Offload the sum.") is None


@pytest.mark.long  # tests/run.sh checks the tree too, by the command
def test_the_command():
    done = subprocess.run([sys.executable, ROOT / "tests/prose.py"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
