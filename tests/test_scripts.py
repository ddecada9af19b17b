"""Tests of the scripts: the tiny model's recipe and the tests' own script."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = (
    *("tools/make_shapes_dataset.py", "tools/precompute_latents.py", "tools/train_text_encoder.py"),
    *("tools/whiten_latents.py", "tools/export_weights.py", "sat/train_vae.py", "sat/train_video.py"),
)
# Prints its arguments, and writes the files that the recipe needs next.
STAND_IN = """
import os, sys
from pathlib import Path

arguments = sys.argv[1:]
print(sys.argv[0], *arguments, os.environ.get("OMP_NUM_THREADS", ""))
if "--output" in arguments:
    output = Path(arguments[arguments.index("--output") + 1])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.touch() if output.suffix else output.mkdir(exist_ok=True)
    if output.name == "t5":
        (output / "spiece.model").touch()
for name in NAMES.get(next((a for a in reversed(arguments) if a.startswith("configs/tiny/")), ""), ()):
    run = Path("ckpts/tiny", f"{name}-01-02-03-04")
    run.mkdir(parents=True, exist_ok=True)
    (run / "3d-vae.pt").touch()
    (run / "latest").write_text("100")
"""
LAUNCHER = "import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[3:]])\n"  # skips two arguments


@pytest.fixture
def recipe(tmp_path) -> Path:
    """Copy the recipe's script, the set-up and configurations; programs are stand-ins."""
    for name in ("tools/train_tiny.sh", "tools/setup_environment.sh", "tools/setup_environment.py", "configs/tiny"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "requirements.txt").write_text("pytest>=1\n")  # installed in the tests' environment
    names = {}
    for config in (tmp_path / "configs" / "tiny").glob("*.yaml"):
        if match := re.search(r"^ *experiment_name: (\S+)", config.read_text(), re.MULTILINE):
            names[f"configs/tiny/{config.name}"] = [match[1]]
    for program in PROGRAMS:
        (tmp_path / program).parent.mkdir(exist_ok=True)
        (tmp_path / program).write_text(f"NAMES = {names}\n{STAND_IN}")
    (tmp_path / "tools" / "torchrun.py").write_text(LAUNCHER)
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    return tmp_path


def run(root: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(root / script), *arguments],
        **{"capture_output": True, "text": True, "timeout": 300, "cwd": "/"},
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )


@pytest.mark.slow
def test_the_recipe_of_the_tiny_model_runs_to_its_end(recipe):
    """The recipe's programs accept its flags, and its configurations exist."""
    result = run(recipe, "tools/train_tiny.sh", PYTHONPATH=str(recipe))
    assert (result.returncode, result.stderr) == (0, "")
    calls = [line.split() for line in result.stdout.splitlines()]
    assert {call[0] for call in calls} == set(PROGRAMS)
    for call in calls:
        given = {word for word in call if word.startswith("--")}
        shown = subprocess.run([sys.executable, str(ROOT / call[0]), "--help"], capture_output=True, text=True)
        assert not [flag for flag in given if not re.search(rf"{flag}\b", shown.stdout)], call
        assert not [word for word in call if word.startswith("configs/") and not (ROOT / word).is_file()], call
    exported = {path.name for path in (recipe / "assets" / "tiny").glob("*.safetensors")}
    assert exported == {f"{part}.safetensors" for part in ("vae", "text_to_video", "image_to_video", "continue")}
    sums = (recipe / "assets" / "tiny" / "SHA256SUMS").read_text()
    assert {line.split()[1] for line in sums.splitlines()} == {*exported, "t5/spiece.model"}


def test_a_part_of_the_recipe_runs_alone(recipe):
    result = run(recipe, "tools/train_tiny.sh", "text", PYTHONPATH=str(recipe))
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["tools/train_text_encoder.py"]
    assert (recipe / "assets" / "tiny" / "t5" / "spiece.model").is_file()
    assert run(recipe, "tools/train_tiny.sh", "text", PYTHONPATH=str(recipe)).stdout == "", "it is there"


@pytest.mark.slow
def test_the_script_of_the_tests_checks_style_and_runs_them():
    result = run(ROOT, "tests/run.sh", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "bash tests/run.sh tests/sgm -k sampler" in result.stdout
    result = run(ROOT, "tests/run.sh", "tests/test_requirements.py", "-k", "imports_are_seen", "-p", "no:cacheprovider")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "All checks passed!" in result.stdout and "1 deselected" not in result.stdout.splitlines()[0]


@pytest.mark.slow
@pytest.mark.long
def test_the_script_of_the_tests_fails_without_a_test():
    assert run(ROOT, "tests/run.sh", "tests/test_requirements.py", "-k", "no_such_test").returncode == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "tests", "count"),
    [
        ("--quick", ("tests/test_config_fuzz.py", "tests/sat/test_model_parallel.py"), 0),
        ("--quick", ("tests/sgm/test_seeds.py",), 3),
        ("--all", ("tests/test_config_fuzz.py", "-k", "changed"), 300),
        ("--long", ("tests/test_config_fuzz.py", "-k", "changed"), 300),
    ],
)
@pytest.mark.long
def test_the_script_of_the_tests_runs_few_or_more(mode, tests, count):
    result = run(ROOT, "tests/run.sh", mode, *tests, "--numprocesses", "0", "--collect-only", "-p", "no:cacheprovider")
    assert result.returncode == (0 if count else 5), result.stdout + result.stderr
    assert sum("::" in line for line in result.stdout.splitlines()) == count


def test_every_script_is_run_by_a_test():
    scripts = [path for pattern in ("*.sh", "*/*.sh", "tools/*.py") for path in ROOT.glob(pattern)]
    programs = {path for path in scripts if path.suffix == ".sh" or "__main__" in path.read_text()}
    programs |= {ROOT / "sat" / f"{name}.py" for name in ("sample_video", "train_video", "train_vae")}
    assert len(programs) > 15
    tests = {path: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    assert not [str(path) for path in programs if not any(re.search(rf"\b{path.stem}\b", t) for t in tests.values())]
