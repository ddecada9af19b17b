"""Test that the launcher finds its script as commands find inputs, and ends in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from sgm.errors import UserError
from tools.torchrun import with_located_script

ROOT = Path(__file__).parents[2]
OPTIONS = ["--standalone", "--nproc_per_node", "2"]


def test_a_script_of_the_repository_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*OPTIONS, "sat/train_video.py", "--base", "sat/train_video.py"]
    assert with_located_script(words) == [*OPTIONS, str(ROOT / "sat/train_video.py"), *words[-2:]]
    (tmp_path / "sat").mkdir()
    (tmp_path / "sat" / "train_video.py").touch()
    assert with_located_script(words) == words, "the current working directory comes first"


@pytest.mark.parametrize("words", [["-m", "cogvideox_sat.command_line", "train"], ["--no_python", "hostname"]])
def test_modules_and_programs_stay_as_they_are(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    assert with_located_script([*OPTIONS, *words]) == [*OPTIONS, *words]


def test_a_missing_script_names_both_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        with_located_script([*OPTIONS, "sat/trian_video.py", "--base", "x"])
    assert str(error.value) == f"script: sat/trian_video.py does not exist, neither in {tmp_path} nor in {ROOT}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "code", "says"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(5)", 5, ""),
        (None, 2, "error: script: program.py does not exist, neither in {folder} nor in {root}"),
        ("import os; os.kill(os.getpid(), 9)", 128 + 9, "error: process 0 was ended by signal 9; 9 may mean no memory"),
    ],
)
def test_no_traceback_is_added(tmp_path, program, code, says):
    if program is not None:
        (tmp_path / "program.py").write_text(program)
    command = [sys.executable, ROOT / "tools" / "torchrun.py", "--standalone", "--nproc_per_node=1", "program.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr.strip()) == (code, says.format(folder=tmp_path, root=ROOT))
