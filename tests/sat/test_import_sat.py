"""`import sat` is SwissArmyTransformer in every folder, although a folder `sat` exists."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"root": ROOT, "sat": ROOT / "sat", "elsewhere": Path("/")}


def find_sat(folder: Path, *first_on_path: Path) -> Path:
    """Return the file that a Python started in `folder` would import as `sat`."""
    path = [str(entry) for entry in first_on_path]
    code = f"import sys, importlib.util as u; sys.path[:0] = {path!r}; print(u.find_spec('sat').origin)"
    return Path(subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True).stdout.strip())


@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("first_on_path", [(), (ROOT / "sat", ROOT)], ids=["plain", "as the commands do"])
def test_sat_is_swissarmytransformer(folder, first_on_path):
    found = find_sat(folder, *first_on_path)
    assert found.name == "__init__.py"
    assert ROOT / "sat" not in found.parents
    assert (found.parent / "model" / "base_model.py").is_file()


def test_the_folder_is_no_package():
    assert not (ROOT / "sat" / "__init__.py").exists()
