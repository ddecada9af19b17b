"""The notebook of the first hour runs completely, and is stored without outputs."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from documents import ROOT

NOTEBOOK = ROOT / "docs" / "first_hour.ipynb"
SIZES = "CLIPS, KNOWN, STEPS = 30, 120, 600"


def cells(kind: str) -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def script() -> str:
    """Return the code of all cells."""
    return "\n\n".join("".join(cell["source"]) for cell in cells("code"))


def test_it_is_kept_without_outputs():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))


def test_its_code_and_links_can_be_read():
    ast.parse(script())
    assert script().count(SIZES) == 1
    linked = re.findall(r"\]\(([\w./-]+)\)", "".join("".join(cell["source"]) for cell in cells("markdown")))
    assert linked and all((NOTEBOOK.parent / path).exists() for path in linked)


@pytest.mark.slow
def test_it_runs(tmp_path, soak_kills):
    """Run all cells with few clips and steps; `soak_kills` skips cells of the long tests."""
    code = script().replace(SIZES, "CLIPS, KNOWN, STEPS = 17, 17, 20")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "sat")))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    made = {path.name for path in Path(tmp_path, "first_hour").glob("*.mp4")}
    assert made == {"square.mp4", "before.mp4", "after.mp4", "half.mp4"}
