"""Every module has a test file of its name or an entry, and entries are correct."""

import subprocess
import sys
from pathlib import Path

import pytest

from mirror import COVERED_BY, ROOT, wrong


@pytest.mark.long  # tests/run.sh checks the tree too, by the command
def test_every_module_has_tests():
    assert wrong() == []


def test_entries_give_a_reason():
    assert not [module for module, (_, reason) in COVERED_BY.items() if len(reason.split()) < 2]


@pytest.fixture
def tree(tmp_path) -> Path:
    """Return a tree of two modules, one with a test file of its name, one with an entry."""
    for name, text in {
        "sat/cogvideox_sat/clips/sources.py": "def f(): ...\n",
        "sat/cogvideox_sat/clips/files.py": "def g(): ...\n",
        "sgm/modules/names.py": "from sgm.util import f\n__all__ = ['f']\n",
        "tests/clips/test_sources.py": "from cogvideox_sat.clips import sources\nimport helper\n",
        "tests/helper.py": "NAME = 'cogvideox_sat.clips.files.g'\n",
        "tests/test_nothing.py": "import os\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


ENTRY = {"clips.files": ("clips/test_sources.py", "used there")}


def test_own_tests_and_entries_are_enough(tree):
    assert wrong(tree, ENTRY) == []


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ({}, "clips.files: has no tests in tests/clips/test_files.py, and no entry in COVERED_BY"),
        ({"clips.files": ("test_nothing.py", "")}, "clips.files: tests/test_nothing.py does not use it"),
        ({"clips.files": ("test_gone.py", "")}, "clips.files: tests/test_gone.py does not exist"),
        (ENTRY | {"gone": ("test_nothing.py", "")}, "gone: does not exist; take it out of COVERED_BY"),
        (
            ENTRY | {"clips.sources": ("clips/test_sources.py", "")},
            "clips.sources: has tests in tests/clips/test_sources.py; take it out of COVERED_BY",
        ),
        (
            ENTRY | {"sgm.modules.names": ("clips/test_sources.py", "")},
            "sgm.modules.names: holds nothing to test; take it out of COVERED_BY",
        ),
    ],
)
def test_what_is_wrong_is_told(tree, entries, line):
    assert wrong(tree, entries) == [line]


def test_a_file_of_the_name_that_uses_something_else_does_not_count(tree):
    (tree / "tests/clips/test_sources.py").write_text("import helper\n")
    assert wrong(tree, ENTRY) == [
        "clips.sources: has no tests in tests/clips/test_sources.py, and no entry in COVERED_BY"
    ]


def test_the_command_tells_and_ends_with_one(tree):
    for name in ("mirror.py", "architecture.py"):
        (tree / "tests" / name).write_text((ROOT / "tests" / name).read_text())
    done = subprocess.run([sys.executable, str(tree / "tests/mirror.py")], capture_output=True, text=True)
    assert done.returncode == 1 and "clips.files: has no tests" in done.stdout
