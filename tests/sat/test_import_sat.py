"""`import sat` is SwissArmyTransformer wherever Python is started, although a folder of that name lies here."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIND = "import importlib.util; print(importlib.util.find_spec('sat').origin)"


@pytest.mark.parametrize("folder", [ROOT, ROOT / "sat", Path("/")], ids=["root", "sat", "elsewhere"])
@pytest.mark.parametrize("as_module", [False, True], ids=["script", "working folder on the path"])
def test_sat_is_swissarmytransformer(folder, as_module, tmp_path):
    script = tmp_path / "find_sat.py"
    script.write_text(FIND)
    command = [sys.executable, "-c", FIND] if as_module else [sys.executable, str(script)]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    assert found.endswith("/sat/__init__.py")
    assert ROOT / "sat" not in Path(found).parents
    assert (Path(found).parent / "model" / "base_model.py").is_file()


def test_the_folder_is_no_package():
    assert not (ROOT / "sat" / "__init__.py").exists()


def test_scripts_in_the_folder_find_it_too():
    """A script's own folder comes first on the path, and holds no module called sat."""
    code = f"import sys; sys.path[:0] = [{str(ROOT / 'sat')!r}, {str(ROOT)!r}]; {FIND}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "site-packages" in found
