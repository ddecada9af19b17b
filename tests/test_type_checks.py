"""The check of types finds errors and missing annotations, and reports its own failures."""

import shutil
from pathlib import Path

import pytest

import type_checks
from architecture import ROOT

MISTAKES = {
    "return-value": "def f(x: int) -> str:\n    return x\n",
    "no-untyped-def": "def f(x, y: int = 0):\n    return x\n",
    "type-arg": "def f(x: dict) -> None: ...\n",
    "var-annotated": "def f() -> None:\n    x = []\n    print(x)\n",
    "possibly-undefined": "def f(x: int) -> int:\n    if x:\n        y = 1\n    return y\n",
    "comparison-overlap": "def f(x: int) -> bool:\n    return x == 'a'\n",
    "unused-ignore": "def f(x: int) -> int:\n    return x  # type: ignore[return-value]\n",
    "redundant-cast": "from typing import cast\n\n\ndef f(x: int) -> int:\n    return cast(int, x)\n",
    "ignore-without-code": "def f(x: int) -> str:\n    return x  # type: ignore\n",
}


def test_where_mypy_does_not_run_nothing_passes_for_checked(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho 'No module named mypy' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(RuntimeError, match="No module named mypy"):
        type_checks.errors(tmp_path)


@pytest.mark.slow
def test_each_kind_of_mistake_is_seen(tmp_path: Path, monkeypatch, capsys):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    package = tmp_path / "sat" / "cogvideox_sat" / "clips"
    package.mkdir(parents=True)
    (package / "right.py").write_text("def f(x: int) -> int:\n    return x\n")
    assert type_checks.errors(tmp_path) == []
    files = {kind: package / f"mistake_{number}.py" for number, kind in enumerate(MISTAKES)}
    for kind, file in files.items():
        file.write_text(MISTAKES[kind])
    found = type_checks.errors(tmp_path)
    for kind, file in files.items():
        assert any(f"{file.name}:" in line and f"[{kind}]" in line for line in found), kind
    assert not any("right.py" in line for line in found)

    monkeypatch.setattr(type_checks, "errors", lambda: found)
    assert type_checks.main() == 1
    assert capsys.readouterr().out.splitlines() == found
