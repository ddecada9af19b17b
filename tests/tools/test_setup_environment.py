"""The set-up finds a complete environment or makes .venv, never using a partial one.

Every test runs the scripts in a copy of them, in a folder with a space in its name; `tiny-package`, the one package
that is installed, comes from a folder of wheels instead of the package index.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import setup_environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """Return a folder with the wheel of `tiny-package`, version 1.0."""
    folder = tmp_path_factory.mktemp("wheels")
    info = "tiny_package-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_package.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-package\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"tiny_package.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return folder


class Repository:
    """A copy of the scripts with requirements of its own."""

    def __init__(self, root: Path, wheels: Path):
        self.root = root
        self.venv_python = root / ".venv" / "bin" / "python"
        (root / "tools").mkdir(parents=True)
        for name in ("tools/setup_environment.sh", "tools/setup_environment.py"):
            shutil.copy(ROOT / name, root / name)
        (root / "requirements.txt").write_text("# comment\ntiny-package>=1.0  # why\nnone; sys_platform == 'none'\n")
        (root / "impossible.txt").write_text("tiny-package>=2.0\n")
        (root / "present.txt").write_text("pytest>=1\n")
        self.environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PYTHON": sys.executable}

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", self.root / "tools" / "setup_environment.sh", *arguments],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": self.environment},
            cwd="/",
            start_new_session=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Return exit status, output and errors of a set-up started in another directory."""
        process = self.start(*arguments)
        output, messages = process.communicate(timeout=120)
        return process.returncode, output.strip(), messages

    def requirements(self, name: str = "requirements.txt") -> str:
        return str(self.root / name)


@pytest.fixture(scope="module")
def repository(tmp_path_factory, wheels) -> Repository:
    """Return a repository whose .venv is made by the first test that needs it."""
    return Repository(tmp_path_factory.mktemp("with a space") / "repo", wheels)


@pytest.fixture
def fresh(tmp_path, wheels) -> Repository:
    return Repository(tmp_path / "with a space", wheels)


@pytest.mark.slow
def test_two_runs_at_once_make_one_environment_and_the_next_installs_nothing(repository):
    runs = [repository.start(), repository.start()]
    outcomes = [(*run.communicate(timeout=120), run.returncode) for run in runs]
    assert [(output.strip(), status) for output, _, status in outcomes] == [(str(repository.venv_python), 0)] * 2
    assert sum(messages.count("installing the packages") for _, messages, _ in outcomes) == 1
    subprocess.run([repository.venv_python, "-c", "import tiny_package"], check=True)
    assert repository.run() == (0, str(repository.venv_python), "")
    # The same from inside .venv, which counts as any other active environment.
    repository.environment["PYTHON"] = str(repository.venv_python)
    assert repository.run() == (0, str(repository.venv_python), "")


@pytest.mark.slow
def test_what_pip_cannot_install_is_reported_and_keeps_the_environment(repository):
    status, output, messages = repository.run(repository.requirements("impossible.txt"))
    assert (status, output) == (1, "")
    assert "No matching distribution found for tiny-package>=2.0" in messages
    assert "pip failed (exit status 1)" in messages
    assert repository.run() == (0, str(repository.venv_python), "")


@pytest.mark.slow
def test_an_interrupted_installation_is_started_over(fresh):
    process = fresh.start()
    assert "installing the packages" in process.stderr.readline()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert fresh.run("--check")[0] == 1
    status, output, messages = fresh.run()
    assert (status, output) == (0, str(fresh.venv_python))
    assert "replacing the incomplete" in messages
    assert fresh.run("--check")[:2] == (0, str(fresh.venv_python))


def test_an_active_environment_that_has_the_packages_is_used(fresh):
    assert fresh.run(fresh.requirements("present.txt")) == (0, sys.executable, "")
    assert not (fresh.root / ".venv").exists()


def test_check_installs_nothing(fresh):
    status, output, messages = fresh.run("--check")
    assert (status, output) == (1, "")
    assert messages.startswith("setup: neither ")
    assert messages.count("\n") == 1
    assert not (fresh.root / ".venv").exists()


def test_an_older_python_is_refused_in_one_line(fresh):
    old = fresh.root / "old python"
    old.write_text("#!/bin/sh\necho /usr/bin/python3.8\nexit 1\n")  # the answer of an old Python to the version probe
    old.chmod(0o755)
    fresh.environment["PYTHON"] = str(old)
    assert fresh.run() == (
        1,
        "",
        f"setup: {old} does not exist or is older than 3.11; install Python 3.11 or newer, or set PYTHON=...\n",
    )


def test_a_missing_requirement_file_is_named(fresh):
    code, python, message = fresh.run("none.txt")
    assert (code, python) == (1, "")
    assert message.startswith("setup: none.txt does not exist") and message.endswith(f" nor in {fresh.root}\n")


@pytest.mark.parametrize("there", [False, True])
def test_a_link_to_another_disk_stays(tmp_path, monkeypatch, there):
    """The folder that .venv links to is replaced if incomplete, and made if missing."""
    disk, link = tmp_path / "disk" / "venv", tmp_path / ".venv"
    link.symlink_to(disk)
    if there:
        (disk / "lib").mkdir(parents=True)
    made = []
    for name, path in (("VENV", link), ("PYTHON", link / "bin" / "python"), ("UNFINISHED", link / "unfinished")):
        monkeypatch.setattr(setup_environment, name, path)
    monkeypatch.setattr(setup_environment, "run", lambda command, _: made.append(command[-1]))
    setup_environment.make_venv()
    assert link.is_symlink() and [path.name for path in disk.iterdir()] == ["unfinished"] and made == [str(link)]


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch, caplog):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/.venv")

    monkeypatch.setattr(setup_environment, "environment_with", refuse)
    monkeypatch.setattr(sys, "argv", ["setup_environment.py"])
    assert setup_environment.main() == 1
    assert caplog.messages == ["/disk/.venv: No space left on device; make room there, or check its permissions"]
