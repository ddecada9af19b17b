"""inference.sh and the finetune scripts set up their command and become it.

Arguments, exit status and signals are passed on.

Every test runs them in a copy, in a folder with a space in its name, where programs only print how they are called.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "inference.sh": "sat/sample_video.py",
    "finetune_single_gpu.sh": "sat/train_video.py",
    "finetune_multi_gpus.sh": "sat/train_video.py",
}
SINGLE = ("inference.sh", "finetune_single_gpu.sh")
# Prints its path, its arguments and what a launcher would tell it.
REPORT = "import os, sys; print(sys.argv[0], sys.argv[1:], os.environ.get('WORLD_SIZE')); sys.exit({})\n"
# Stands for the encoder: makes the folder after --output.
ENCODER = f"import os, sys; os.makedirs(sys.argv[sys.argv.index('--output') + 1])\n{REPORT.format(0)}"
# Stands for torchrun, whose start takes seconds.
LAUNCHER = "import sys; print('torchrun', sys.argv[1:]); sys.exit(7)\n"


class Scripts:
    def __init__(self, root: Path):
        self.root = root
        for folder in ("tools", "sat", "bin"):
            (root / folder).mkdir(parents=True)
        for name in (*PROGRAMS, "tools/run_command.sh", "tools/setup_environment.sh", "tools/setup_environment.py"):
            shutil.copy(ROOT / name, root / name)
        (root / "requirements.txt").write_text("pytest>=1\n")  # installed in the tests' environment
        for program in PROGRAMS.values():
            (root / program).write_text(REPORT.format(7))
        (root / "tools" / "make_shapes_dataset.py").write_text(REPORT.format(0))
        (root / "tools" / "precompute_latents.py").write_text(ENCODER)
        (root / "tools" / "torchrun.py").write_text(LAUNCHER)
        path = os.pathsep.join((str(root / "bin"), os.environ["PATH"]))
        self.environment = {**os.environ, "PYTHON": sys.executable, "PATH": path, "NPROC": ""}

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", self.root / script, *arguments],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": "/"},
            env={**self.environment, **environment},
        )

    def run(self, script: str, *arguments: str, **environment: str) -> tuple[int, list[str]]:
        process = self.start(script, *arguments, **environment)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output.splitlines()

    def gpus(self, count: int) -> None:
        """Pretend that the machine has so many."""
        lines = "".join(f"echo 'GPU {i}: NVIDIA'\n" for i in range(count))
        (self.root / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
        (self.root / "bin" / "nvidia-smi").chmod(0o755)


@pytest.fixture
def scripts(tmp_path) -> Scripts:
    return Scripts(tmp_path / "with a space")


@pytest.mark.parametrize("script", SINGLE)
def test_arguments_and_exit_status_pass_through(scripts, script):
    arguments = ["--base", "a b.yaml", "--note", "it's $HOME"]
    assert scripts.run(script, *arguments) == (7, [f"{PROGRAMS[script]} {arguments} None"])


def test_clips_are_drawn_and_encoded_for_the_tiny_training_unless_they_are_there(scripts):
    arguments = ("--base", "configs/tiny/a.yaml", "configs/tiny/sft.yaml")
    _, lines = scripts.run("finetune_single_gpu.sh", *arguments)
    preparation = ["tools/make_shapes_dataset.py", "tools/precompute_latents.py"]
    assert [line.split()[0] for line in lines] == [*preparation, *preparation, "sat/train_video.py"]
    for number, (folder, shown) in enumerate((("data/spirals", "'spiral'"), ("data/known_shapes", "'240'"))):
        draw, encode = lines[2 * number : 2 * number + 2]
        assert f"'--output', '{folder}'" in draw
        assert shown in draw
        assert f"'--train_data', '{folder}'" in encode
    _, lines = scripts.run("finetune_single_gpu.sh", *arguments)
    assert [line.split()[0] for line in lines] == ["sat/train_video.py"]
    (scripts.root / "data" / "spirals_latents").rmdir()
    assert len(scripts.run("finetune_single_gpu.sh", *arguments)[1]) == 3


def test_clips_are_encoded_anew_for_another_vae(scripts):
    """Latents that are older than the VAE's weights belong to another VAE."""
    arguments = ("--base", "configs/tiny/a.yaml", "configs/tiny/sft.yaml")
    vae = scripts.root / "assets" / "tiny" / "vae.safetensors"
    vae.parent.mkdir(parents=True)
    vae.touch()
    assert len(scripts.run("finetune_single_gpu.sh", *arguments)[1]) == 5
    assert len(scripts.run("finetune_single_gpu.sh", *arguments)[1]) == 1
    (scripts.root / "data" / "spirals_latents" / "old").touch()
    later = time.time() + 60
    os.utime(vae, (later, later))
    assert len(scripts.run("finetune_single_gpu.sh", *arguments)[1]) == 5
    assert not (scripts.root / "data" / "spirals_latents" / "old").exists()


@pytest.mark.parametrize("script", SINGLE)
def test_an_edited_command_is_run(scripts, script):
    command = f'run_cmd="TOKENIZERS_PARALLELISM=true python {PROGRAMS[script]} --base x.yaml"'
    edited, replaced = re.subn('^run_cmd=".*$', command, (ROOT / script).read_text(), flags=re.MULTILINE)
    assert replaced == 1
    (scripts.root / script).write_text(edited)
    assert scripts.run(script) == (7, [f"{PROGRAMS[script]} ['--base', 'x.yaml'] None"])


@pytest.mark.parametrize(
    ("script", "line", "called"),
    [
        (
            "inference.sh",
            "$environs python sample_video.py --base x.yaml",
            "sat/sample_video.py ['--base', 'x.yaml'] None",
        ),
        (
            "finetune_single_gpu.sh",
            "$environs python train_video.py --base x",
            "sat/train_video.py ['--base', 'x'] None",
        ),
        ("inference.sh", "A=1 python -u sample_video.py --note b.py", "sat/sample_video.py ['--note', 'b.py'] None"),
        (
            "finetune_multi_gpus.sh",
            "$environs torchrun --standalone --nproc_per_node=8 train_video.py --base x",
            "torchrun ['--standalone', '--nproc_per_node=8', 'sat/train_video.py', '--base', 'x']",
        ),
        ("inference.sh", "bin/mpirun -np 2 sample_video.py --base x", "mpirun -np 2 sat/sample_video.py --base x"),
    ],
)
def test_command_lines_of_the_original_run(scripts, script, line, called):
    """They begin with `$environs`, and name a script in sat/ without its folder."""
    (scripts.root / "bin" / "mpirun").write_text('#!/bin/sh\necho mpirun "$@"\nexit 7\n')
    (scripts.root / "bin" / "mpirun").chmod(0o755)
    edited, replaced = re.subn('^run_cmd=".*$', f'run_cmd="{line}"', (ROOT / script).read_text(), flags=re.MULTILINE)
    assert replaced == 1
    (scripts.root / script).write_text(edited)
    assert scripts.run(script) == (7, [called])


def test_the_variables_that_the_original_sets_reach_the_command(scripts):
    lines = 'environs="WORLD_SIZE=1 RANK=0"\nrun_cmd="$environs python sample_video.py --base x"'
    edited = re.sub('^run_cmd=".*$', lines, (ROOT / "inference.sh").read_text(), flags=re.MULTILINE)
    (scripts.root / "inference.sh").write_text(edited)
    assert scripts.run("inference.sh") == (7, ["sat/sample_video.py ['--base', 'x'] 1"])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, ""),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "None"),
    ],
)
def test_the_allocator_of_gpus_is_set_unless_the_user_has(scripts, environment, expected):
    reports = "import os; print(os.environ.get('PYTORCH_CUDA_ALLOC_CONF'))\n"
    (scripts.root / "tools" / "torchrun.py").write_text(reports)
    assert scripts.run("finetune_multi_gpus.sh", "--base", "x.yaml", **environment) == (0, [expected])


@pytest.mark.parametrize(
    ("script", "environment", "gpus", "launch"),
    [
        ("inference.sh", {"NPROC": "3"}, 0, ["--standalone", "--nproc_per_node=3"]),
        ("finetune_multi_gpus.sh", {}, 0, ["--standalone", "--nproc_per_node=1"]),
        ("finetune_multi_gpus.sh", {}, 8, ["--standalone", "--nproc_per_node=8"]),
        ("finetune_multi_gpus.sh", {"NPROC": "3"}, 8, ["--standalone", "--nproc_per_node=3"]),
        (
            "finetune_multi_gpus.sh",
            {"TORCHRUN_ARGS": "--nnodes=2 --node_rank=1"},
            8,
            ["--nnodes=2", "--node_rank=1", "--nproc_per_node=8"],
        ),
    ],
)
def test_several_processes_go_through_torchrun(scripts, script, environment, gpus, launch):
    scripts.gpus(gpus)
    arguments = ["--base", "a b.yaml"]
    outcome = scripts.run(script, *arguments, **environment, PYTHONPATH=str(scripts.root / "bin"))
    assert outcome == (7, [f"torchrun {[*launch, PROGRAMS[script], *arguments]}"])


def test_the_single_process_script_is_one_process(scripts):
    assert scripts.run("finetune_single_gpu.sh", "--base", "x.yaml", NPROC="4")[1] == [
        "sat/train_video.py ['--base', 'x.yaml'] None"
    ]


@pytest.mark.parametrize("script", SINGLE)
def test_signals_reach_the_command(scripts, script):
    waiting = "import pathlib, time; pathlib.Path('started').touch(); time.sleep(60)\n"
    (scripts.root / PROGRAMS[script]).write_text(waiting)
    process = scripts.start(script, "--base", "x.yaml")
    deadline = time.monotonic() + 20
    while not (scripts.root / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()  # the process that was started, not its children
    assert process.wait(timeout=10) == -signal.SIGTERM


@pytest.mark.parametrize("script", PROGRAMS)
def test_help_builds_nothing(scripts, script):
    _, lines = scripts.run(script, "--help")
    assert lines[-1] == f"{PROGRAMS[script]} ['--help'] None"
    assert not any(line.startswith("tools/") for line in lines)
    assert any(f"bash {script} --base" in line for line in lines)


@pytest.mark.parametrize("script", PROGRAMS)
def test_help_installs_nothing(scripts, script):
    (scripts.root / "requirements.txt").write_text("no-such-package>=1\n")
    status, lines = scripts.run(script, "--help")
    assert status == 0
    assert any(f"bash {script} --base" in line for line in lines)
    assert not (scripts.root / ".venv").exists()


def test_the_recipe_of_the_tiny_model_names_its_parts():
    script = ["bash", ROOT / "tools" / "train_tiny.sh"]
    result = subprocess.run([*script, "vae", "audio"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "part 'audio' does not exist; name some of text vae text_to_video image_to_video" in result.stderr
    result = subprocess.run([*script, "--help"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert "bash tools/train_tiny.sh text vae" in result.stdout
