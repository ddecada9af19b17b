"""The commands in the guides are accepted by the programs that they name, and the files that they name are there."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from cogvideox_sat.commands.program_names import TOOLS

ROOT = Path(__file__).parents[1]
GUIDES = ("README.md", "assets/tiny/README.md", "benchmarks/RESULTS.md")
SCRIPTS = {
    "inference.sh": "sat/sample_video.py",
    "finetune_single_gpu.sh": "sat/train_video.py",
    "finetune_multi_gpus.sh": "sat/train_video.py",
}
COMMAND = re.compile(r"(?:cogvideox|-m cogvideox_sat\.command_line) (convert \w+|[a-z-]+)([^`|#\n]*)")
COMMANDS = {"sample": "sat/sample_video.py", "train": "sat/train_video.py", "train-vae": "sat/train_vae.py"}
COMMANDS |= {"memory": "tools/estimate_memory.py"} | {f"convert {name}": f"tools/{name}.py" for name in TOOLS}
PROGRAM = re.compile(r"(?<![\w/])((?:(?:sat|tools|benchmarks)/)?\w+\.(?:py|sh))\b([^`|#\n]*)")
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")
TORCHRUN = ("--standalone", "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint")
OF_OTHERS = ("sat/README.md",)  # in the original's repository


@cache
def text(guide: str) -> str:
    return (ROOT / guide).read_text().replace("\\\n", " ")


@cache
def flags_of(program: str) -> set[str]:
    """Return the flags that a program's `--help` shows."""
    command = [sys.executable, str(ROOT / program), "--help"]
    return set(FLAG.findall(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def commands(guide: str) -> Iterator[tuple[str, list[str]]]:
    """Return the programs of the repository that a guide runs, each with the flags it is given."""
    for line in text(guide).splitlines():
        for name, rest in PROGRAM.findall(line):
            program = SCRIPTS.get(name, name if "/" in name else f"tools/{name}")
            if program.endswith(".py") and (ROOT / program).exists():
                yield program, FLAG.findall(rest)
        for name, rest in COMMAND.findall(line):
            if name != "convert":  # which has a list of names as its help
                yield COMMANDS[name.replace("convert NAME", "convert merge_lora")], FLAG.findall(rest)


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_flags_are_those_of_the_programs(guide):
    given = {(program, flag) for program, flags in commands(guide) for flag in flags if flag not in TORCHRUN}
    assert given
    assert not {(program, flag) for program, flag in given if flag not in flags_of(program)}


@pytest.mark.parametrize("guide", (*GUIDES, "CONTRIBUTING.md"))
def test_named_files_are_there(guide):
    named = set(re.findall(r"\b(?:configs|tools|sat|benchmarks|assets|tests)/[\w./-]*\.\w+\b", text(guide)))
    assert len(named) > 3
    assert not {path for path in named if not (ROOT / path).exists() and path not in OF_OTHERS}
    linked = set(re.findall(r"\]\(([\w./-]+)\)", text(guide)))
    assert not {path for path in linked if not ((ROOT / guide).parent / path).exists()}


def test_a_wrong_flag_is_seen():
    assert "--seed" in flags_of("sat/sample_video.py")
    assert "--sede" not in flags_of("sat/sample_video.py")
    assert ("sat/sample_video.py", ["--base", "--seed"]) in list(commands("README.md"))
    assert ("tools/estimate_memory.py", ["--base"]) in list(commands("README.md")), "as cogvideox memory"
