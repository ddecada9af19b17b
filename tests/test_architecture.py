"""The layers hold, and a violation is found."""

import subprocess
import sys
from pathlib import Path

import pytest

from architecture import ROOT, broken_layers, broken_promises


@pytest.mark.long  # tests/run.sh checks the tree too, by the command
def test_layers_hold():
    assert broken_layers(ROOT) == []


@pytest.mark.long  # tests/run.sh checks the tree too, by the command
def test_what_plans_imports_no_pytorch():
    assert broken_promises(ROOT) == []


@pytest.fixture
def planted(tmp_path) -> Path:
    """Return a tree of two clean modules."""
    for name, text in {"files/atomic.py": "import os\n", "configuration/files.py": "import yaml\n"}.items():
        path = tmp_path / "sat" / "cogvideox_sat" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    for name in ("meta_device", "model_checks"):
        (tmp_path / "sat/cogvideox_sat/configuration" / f"{name}.py").write_text("import torch\n")
    assert broken_layers(tmp_path) == broken_promises(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        (
            "files/atomic.py",
            "def f():\n    from cogvideox_sat.configuration import files\n",
            "2: imports up, configuration.files",
        ),
        ("files/atomic.py", "import train_video\n", "1: imports up, train_video"),
        ("configuration/files.py", "from cogvideox_sat.media.reading import x\n", "1: imports sideways, media.reading"),
        ("stray.py", "", " no layer of tests/architecture.py has it; put it into a package"),
    ],
)
def test_imports_up_and_sideways_are_seen(planted, name, text, line):
    (planted / "sat/train_video.py").write_text("")
    (planted / "sat/cogvideox_sat/media").mkdir()
    (planted / "sat/cogvideox_sat/media/reading.py").write_text("")
    (planted / "sat/cogvideox_sat" / name).write_text(text)
    assert broken_layers(planted) == [f"sat/cogvideox_sat/{name}:{line}"]


def test_pytorch_is_seen_through_other_modules(planted):
    (planted / "sat/cogvideox_sat/files/atomic.py").write_text("def f():\n    import torch\n")
    (planted / "sat/cogvideox_sat/configuration/files.py").write_text("from cogvideox_sat.files.atomic import f\n")
    assert broken_promises(planted) == []
    (planted / "sat/cogvideox_sat/files/atomic.py").write_text("from torch import nn\n")
    assert broken_promises(planted) == [
        "sat/cogvideox_sat/configuration/files.py: imports files.atomic, torch, before the request is checked",
        "sat/cogvideox_sat/files/atomic.py: imports torch, before the request is checked",
    ]


def test_the_command_ends_with_one_where_a_rule_is_broken(planted):
    (planted / "sat/cogvideox_sat/files/atomic.py").write_text("import torch\n")
    (planted / "tests").mkdir()
    script = planted / "tests" / "architecture.py"
    script.write_text((ROOT / "tests" / "architecture.py").read_text())
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 1 and "imports torch" in done.stdout
