"""Find or make a Python environment with the given requirements, and print its Python.

setup_environment.sh chooses the interpreter and runs this file, which only needs the standard library and imports none
of the packages that it checks.
"""

import argparse
import contextlib
import fcntl
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
UNFINISHED = VENV / ".installation-unfinished"  # exists while packages change: the environment is incomplete
LOG = VENV / "installation.log"

logger = logging.getLogger("setup")


class SetupError(Exception):
    """The reason why no environment is available, on one line."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=[ROOT / "requirements.txt"])
    parser.add_argument("--check", action="store_true", help="install nothing; fail if no environment is ready")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        python = environment_with(arguments.files, install=not arguments.check)
    except SetupError as error:
        logger.error("%s", error)
        return 1
    except OSError as error:
        place = error.filename or VENV
        logger.error("%s: %s; make room there, or check its permissions", place, error.strerror or error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; the next run starts over")
        return 130
    sys.stdout.write(f"{python}\n")
    return 0


def environment_with(files: list[Path], install: bool) -> str:
    """Return the path of a Python that has the requirements of `files`.

    Raises:
        SetupError: no environment has them, or it cannot be made.
    """
    files = [located(file) for file in files]
    if is_ready(files):
        return sys.executable
    if not is_running_in_venv():
        check_chosen_version()
        if is_venv_ready(files):
            return str(PYTHON)
    if not install:
        raise SetupError(f"neither {sys.executable} nor {VENV} has all of {', '.join(map(str, files))}")
    with lock():
        if not is_venv_ready(files):  # another process may have done it while this one waited
            make_venv()
            install_into_venv(files)
    return str(PYTHON)


def located(file: Path) -> Path:
    """Return a requirement file, searched in the current working directory and the repository.

    Raises:
        SetupError: it does not exist in either.
    """
    for candidate in (file, ROOT / file):
        if candidate.is_file():
            return candidate
    raise SetupError(f"{file} does not exist, neither in {Path.cwd()} nor in {ROOT}")


# ---------------------------------------------------------------------------------------------------------------------
# Checks of an environment, by the metadata of its distributions: a tenth of a second
# ---------------------------------------------------------------------------------------------------------------------


def is_ready(files: list[Path]) -> bool:
    """Return whether the running interpreter has all requirements."""
    if is_running_in_venv() and UNFINISHED.exists():
        return False
    return all(is_satisfied(line) for file in files for line in requirement_lines(file))


def is_venv_ready(files: list[Path]) -> bool:
    """Return whether .venv has all requirements, according to its own interpreter."""
    if UNFINISHED.exists() or not os.access(PYTHON, os.X_OK):
        return False
    command = [str(PYTHON), __file__, "--check", *map(str, files)]
    return subprocess.run(command, capture_output=True).returncode == 0


def is_running_in_venv() -> bool:
    return Path(sys.prefix).resolve() == VENV.resolve()


def requirement_lines(file: Path) -> list[str]:
    lines = (line.split(" #")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def is_satisfied(line: str) -> bool:
    """Return whether the running interpreter has a distribution that fits a requirement line."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:
        try:  # a bare Python has it inside pip
            from pip._vendor.packaging.requirements import InvalidRequirement, Requirement
        except ImportError:
            return False
    try:
        requirement = Requirement(line)
    except InvalidRequirement:
        return False  # an option such as -r or --index-url, which only pip understands
    if requirement.marker and not requirement.marker.evaluate():
        return True
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)


# ---------------------------------------------------------------------------------------------------------------------
# Making .venv
# ---------------------------------------------------------------------------------------------------------------------


def check_chosen_version() -> None:
    """Check that .venv has the version of the interpreter that PYTHON names.

    Raises:
        SetupError: .venv was made with another version.
    """
    config = VENV / "pyvenv.cfg"
    if not os.environ.get("PYTHON") or not config.is_file():
        return
    chosen = sys.version_info[:2]
    made_with = re.search(r"^version(?:_info)? *= *(\d+)\.(\d+)", config.read_text(), re.MULTILINE)
    if made_with and (int(made_with[1]), int(made_with[2])) != chosen:
        version = "{}.{}".format(*chosen)
        raise SetupError(f"PYTHON is Python {version}, but {VENV} was made with another; remove it or unset PYTHON")


@contextlib.contextmanager
def lock() -> Iterator[None]:
    """Hold the lock on .venv within the block; it ends with the process in any case."""
    try:
        file = (ROOT / ".venv.lock").open("w")
    except OSError as error:
        raise SetupError(f"cannot write to {ROOT}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that installs into %s", VENV)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_venv() -> None:
    """Make .venv, unless it works; an incomplete or broken one is replaced."""
    if os.access(PYTHON, os.X_OK) and not UNFINISHED.exists():
        return
    base = getattr(sys, "_base_executable", None) or sys.executable  # this Python may be that of the .venv to replace
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            package = "python{}.{}-venv".format(*sys.version_info)
            raise SetupError(f"{base} has no module {module}; install it (Debian, Ubuntu: apt install {package})")
    folder = VENV.resolve()  # .venv may be a link to another disk, whose folder may not exist yet
    if folder.exists():
        logger.info("replacing the incomplete %s", VENV)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    UNFINISHED.touch()
    run([base, "-m", "venv", str(VENV)], f"{base} could not make {VENV}")


def install_into_venv(files: list[Path]) -> None:
    logger.info(
        "installing the packages of %s into %s: several GB and 5 to 20 minutes the first time; progress: %s",
        " and ".join(os.path.relpath(file, ROOT) for file in files),
        VENV,
        LOG,
    )
    UNFINISHED.touch()
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    for file in files:
        command += ["-r", str(file)]
    try:
        run(command, "pip failed")
    except SetupError:
        UNFINISHED.unlink()  # a failed pip restores the environment, unlike an interrupted one
        raise
    UNFINISHED.unlink()
    logger.info("installed")


def run(command: list[str], complaint: str) -> None:
    """Run a command with its output in the log; if it fails, show the last lines.

    Raises:
        SetupError: the command failed.
    """
    with LOG.open("a+b") as log:
        # pip refuses PIP_USER=1, which some users set, inside an environment.
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PIP_USER": "0"})
        if status.returncode != 0:
            last_lines = LOG.read_text(errors="replace").splitlines()[-15:]
            sys.stderr.write("\n".join([*last_lines, ""]))
            raise SetupError(f"{complaint} (exit status {status.returncode}); its output is in {LOG}")


if __name__ == "__main__":
    sys.exit(main())
