"""The folder of a new run, and which run `resume: latest` means."""

import os
import subprocess
import sys
from argparse import Namespace
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from cogvideox_sat.runs import folders
from cogvideox_sat.runs.folders import (
    LOCK_FILE,
    claim,
    find_resume,
    new_run_folder,
    removed_if_empty,
    runs_of,
    write_config,
)
from sgm.errors import UserError

NOW = datetime(2024, 3, 1, 9, 5)


def arguments(save: Path, resume: str | None = "latest") -> Namespace:
    return Namespace(save=str(save), experiment_name="a.b", resume=resume)


def saved_run(save: Path, name: str, time: int) -> Path:
    """Return a run that saved something at `time`."""
    run = save / name
    run.mkdir()
    (run / "latest").touch()
    os.utime(run / "latest", (time, time))
    return run


def test_runs_of_one_minute_have_folders_of_their_own(tmp_path):
    names = [new_run_folder(arguments(tmp_path / "runs"), NOW).name for _ in range(3)]
    assert names == ["a.b-03-01-09-05", "a.b-03-01-09-05-2", "a.b-03-01-09-05-3"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make"):
        new_run_folder(arguments(tmp_path / "file"), NOW)


def test_the_latest_run_is_the_one_that_saved_last(tmp_path):
    older = saved_run(tmp_path, "a.b-03-01-09-05-2", time=100)
    newer = saved_run(tmp_path, "a.b-01-01-00-00", time=200)
    for name in ("axb-03-01-09-05", "a.b-more-03-01-09-05", "a.b"):  # runs of other experiments
        saved_run(tmp_path, name, time=300)
    (tmp_path / "a.b-03-02-09-05").mkdir()  # a run without a checkpoint
    assert set(runs_of(arguments(tmp_path))) == {older, newer}
    assert find_resume(arguments(tmp_path), lambda run: run / "found") == newer / "found"


def test_a_first_run_of_latest_is_new_and_says_so(tmp_path, caplog):
    assert find_resume(arguments(tmp_path / "runs"), lambda _: pytest.fail("looked for")) is None
    assert "starting a new run" in caplog.text
    assert find_resume(arguments(tmp_path, resume=None), lambda _: pytest.fail("looked for")) is None


def test_a_path_is_what_it_names(tmp_path):
    assert find_resume(arguments(tmp_path, resume="some/run"), lambda path: path) == Path("some/run")


def test_the_configuration_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "mine.yaml").write_text("kept")
    (tmp_path / "training_config.yaml").symlink_to("mine.yaml")
    write_config(tmp_path, {"b": 1, "a": [2]})
    assert (tmp_path / "mine.yaml").read_text() == "kept"
    text = (tmp_path / "training_config.yaml").read_text()
    assert list(yaml.safe_load(text).items()) == [("b", 1), ("a", [2])]


@pytest.mark.parametrize("files", [[], ["log"]])
def test_a_folder_goes_when_nothing_was_written(tmp_path, files):
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(ZeroDivisionError), removed_if_empty(folder):
        for name in files:
            (folder / name).touch()
        raise ZeroDivisionError
    assert folder.exists() == bool(files)


HOLDS = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX)
print("holds", flush=True)
sys.stdin.read()
"""


def test_a_run_belongs_to_one_process(tmp_path):
    """Until that ends, however it does."""
    command = [sys.executable, "-S", "-c", HOLDS, str(tmp_path / LOCK_FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"holds\n"
        with pytest.raises(UserError, match=r"resume: another process already continues "):
            claim(tmp_path)
        other.kill()
        other.wait()
        file = claim(tmp_path)
        assert file is not None
        file.close()


def test_a_file_system_without_locks_claims_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    assert claim(tmp_path) is None


def test_a_run_stays_claimed_as_long_as_its_writer_exists(tmp_path):
    """Also when the process reads the files: a lock ends with any descriptor of its file."""
    settings = Namespace(merged_config={"args": {}}, tensorboard=False, wandb=False, wandb_project=None)
    write_config(tmp_path, {"args": {"of": "an earlier process"}})
    writer = folders.open_run_folder(tmp_path, settings, None, 0)
    for path in tmp_path.iterdir():
        if path.name != LOCK_FILE:
            path.read_bytes()
    write_config(tmp_path, {"args": {}})
    assert os.waitstatus_to_exitcode(os.waitpid(forked_claim(tmp_path), 0)[1]) == 1
    writer.close()
    del writer
    assert os.waitstatus_to_exitcode(os.waitpid(forked_claim(tmp_path), 0)[1]) == 0


@pytest.mark.parametrize(("names", "stays"), [((), False), ((LOCK_FILE,), False), ((LOCK_FILE, "latest"), True)])
def test_the_folder_of_a_run_that_fails_at_once_is_removed(tmp_path, names, stays):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    with pytest.raises(ZeroDivisionError), removed_if_empty(folder):
        1 / 0  # noqa: B018
    assert folder.exists() == stays and all((folder / name).exists() == stays for name in names)


def forked_claim(folder: Path) -> int:
    """Return the process that tries to claim a folder, and ends with 1 if it must not."""
    child = os.fork()
    if not child:
        try:
            claim(folder)
        except UserError:
            os._exit(1)
        os._exit(0)
    return child


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/run: Not a directory; a part of the path is a file"):
        folders.open_run_folder(tmp_path / "file" / "run", Namespace(merged_config={}), None, 0)
