"""The wheel has the program with its data and nothing else, and its command works."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import PackagePath, distribution
from pathlib import Path

import pytest

from videos import read_video

pytestmark = pytest.mark.slow  # builds the wheel and an environment

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ("requirements.txt", "requirements-web.txt", "tests/requirements.txt", "docs/requirements.txt")
BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE", *REQUIREMENTS)
PACKAGES = {"cogvideox_sat": ROOT / "sat", "sgm": ROOT, "vae_modules": ROOT}
MODULES = {path.name for path in (ROOT / "sat").glob("*.py")}
DATA = "cogvideox_sat/shipped/"


def run(*command: object, **options: object) -> subprocess.CompletedProcess:
    """Run a command on one thread, without the folders that the tests put on Python's path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = [str(word) for word in command]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy of the tree with a module of an earlier build."""
    tree, built = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        (tree / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    for name in ("sat", "sgm", "vae_modules", "configs", "assets"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    stale = tree / "build" / "lib" / "sat" / "renamed_since.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    result = run(sys.executable, "-m", "pip", "wheel", *options, "-w", built, tree)
    assert result.returncode == 0, result.stderr
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def hashed_files(name: str) -> dict[PackagePath, str]:
    """Return the files in an installed distribution's RECORD, with their SHA-256."""
    return {file: file.hash.value for file in distribution(name).files if file.hash}


def sha256(path: Path) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """Make an environment with SwissArmyTransformer and this package.

    Other packages are those of the tests' environment.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder)}))
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "others.pth").write_text("\n".join(sorted(others)) + "\n")
    for file in hashed_files("SwissArmyTransformer"):
        if ".." not in file.parts:
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), site / file)
    python = folder / "bin" / "python"
    result = run(
        *(sys.executable, "-m", "pip", "--python", python),
        *("install", "--no-deps", "--no-index", "--force-reinstall", "--quiet", wheel),
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_top_level_names_are_those_of_the_program(names):
    top = {name.partition("/")[0] for name in names}
    described = {name for name in top if name.endswith(".dist-info")}
    assert len(described) == 1
    assert top - described == PACKAGES.keys() | MODULES
    assert len(MODULES) == 7
    assert not [name for name in names if name.startswith("sat/")]


def test_every_module_is_there(names):
    for package, folder in PACKAGES.items():
        files = [path for path in (folder / package).rglob("*") if path.suffix in (".py", ".css", ".typed")]
        modules = {path.relative_to(folder).as_posix() for path in files}
        assert len(modules) > 5
        found = {name for name in names if name.startswith(f"{package}/") and not name.startswith(DATA)}
        assert found == modules
        assert f"{package}/py.typed" in found, "type checkers would take every value of it as Any"


def test_configurations_and_the_tiny_model_come_along(wheel, names):
    shipped = {name.removeprefix(DATA) for name in names if name.startswith(DATA)}
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*") if path.is_file()}
    weights = {f"{part}.safetensors" for part in ("text_to_video", "image_to_video", "continue", "vae")}
    text = {path.relative_to(ROOT).as_posix() for path in (ROOT / "assets" / "tiny" / "t5").iterdir()}
    tiny = {f"assets/tiny/{name}" for name in (*weights, "README.md", "SHA256SUMS")}
    assert shipped == configs | text | tiny
    with zipfile.ZipFile(wheel) as file:
        assert all(file.read(DATA + name) == (ROOT / name).read_bytes() for name in shipped)


def test_files_of_swissarmytransformer_stay_as_they_are(environment, names):
    """An installed `sat/arguments.py` of ours would replace SwissArmyTransformer's."""
    files = hashed_files("SwissArmyTransformer")
    assert "sat/arguments.py" in map(str, files)
    assert not names & {str(file) for file in files}
    site = next(environment.glob("lib/python*/site-packages"))
    for file, digest in files.items():
        assert sha256(Path(file.locate())) == digest, f"{file}, where the tests run"
        assert ".." in file.parts or sha256(site / file) == digest, file


def test_the_command_answers_without_pytorch(environment, tmp_path):
    """The command answers in under two seconds, under its own name."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    code += "usage = resource.getrusage(resource.RUSAGE_CHILDREN); print('SECONDS', usage.ru_utime + usage.ru_stime)"
    command = environment / "bin" / "cogvideox"
    for words in (["sample"], ["train"], ["train-vae"], ["convert", "merge_lora"], ["memory"]):
        result = run(sys.executable, "-c", code, command, *words, "--help", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert f"usage: cogvideox {' '.join(words)} [" in result.stdout
        assert not re.search(
            r"\b(?:sat|tools)/\w+\.py|inference\.sh", result.stdout.replace("tools/convert_demo.py", "")
        )
        assert float(result.stdout.rpartition("SECONDS ")[2]) < 2


def test_the_package_itself_imports_nothing_heavy(environment, tmp_path):
    code = "import sys, cogvideox_sat; print(cogvideox_sat.__version__, {'torch', 'sgm'} & sys.modules.keys())"
    result = run(environment / "bin" / "python", "-c", code, cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("0.1.0 set()\n", "")


def test_the_tiny_model_samples_in_an_empty_folder(environment, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("a large orange square moving right on a red background\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    base = ("configs/tiny/cogvideox_tiny.yaml", "configs/tiny/inference.yaml")
    few = ("--input_file", prompt, "--sampling_num_steps", "2", "--no-looping_previews")
    result = run(environment / "bin" / "cogvideox", "sample", "--base", *base, *few, cwd=empty)
    assert result.returncode == 0, result.stderr
    shipped = next(environment.glob("lib/python*/site-packages")) / DATA
    assert f"load: assets/tiny/text_to_video.safetensors is taken from {shipped}" in result.stderr
    assert str(ROOT) not in result.stderr
    video = next(empty.glob("outputs/tiny/0_*/0/000000.mp4"))
    assert len(read_video(video)[1]) == 9

    code = "import cogvideox_sat as cv\n"
    code += f"with cv.load('tiny') as pipe:\n    pipe({prompt.read_text().strip()!r}, steps=2).save('square.mp4')\n"
    result = run(environment / "bin" / "python", "-c", code, cwd=empty)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert (empty / "square.mp4").read_bytes() == video.read_bytes()
    assert json.loads((empty / "square.json").read_text()) == json.loads(video.with_suffix(".json").read_text())


def test_a_configuration_may_name_classes_of_the_installed_modules_alone(environment, tmp_path):
    """Installed, `sat` is SwissArmyTransformer, whose annotations are not checked."""
    code = "from importlib.util import find_spec\nfrom sgm.config_values import is_own_file\n"
    code += "names = ['sat', 'sgm', 'train_video', 'cogvideox_sat.version']\n"
    code += "print([is_own_file(find_spec(name).origin) for name in names])\n"
    code += "from sgm.util import get_configs_path\nprint(get_configs_path())"
    result = run(environment / "bin" / "python", "-c", code, cwd=tmp_path)
    own, configs = result.stdout.splitlines()[-2:]
    assert own == "[False, True, True, True]", result.stderr
    assert (Path(configs) / "tiny" / "inference.yaml").is_file() and DATA in configs


def test_the_checkout_is_not_put_on_the_path_of_an_installed_script(environment, tmp_path):
    code = "import sys\nbefore = list(sys.path)\nimport sample_video, train_video, train_vae\nprint(sys.path == before)"
    assert run(environment / "bin" / "python", "-c", code, cwd=tmp_path).stdout == "True\n"
