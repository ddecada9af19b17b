"""The programs accept the commands in the guides, and the files named there exist."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

import pytest

from cogvideox_sat.commands.program_names import TOOLS
from cogvideox_sat.configuration.argument_lists import SamplingArguments, TrainingArguments, VaeTrainingArguments
from cogvideox_sat.configuration.argument_parser import parser_for
from documents import ROOT, documents
from sgm.errors import UserError

# Translations have the commands of the English pages: see tests/test_documents.py.
GUIDES = [
    guide for guide in documents() if guide != "CONTRIBUTING.md" and not re.search(r"_(zh|ja)\.md|/(zh|ja)/", guide)
]
SCRIPTS = {
    "inference.sh": "sat/sample_video.py",
    "finetune_single_gpu.sh": "sat/train_video.py",
    "finetune_multi_gpus.sh": "sat/train_video.py",
}
COMMAND = re.compile(r"(?:cogvideox|-m cogvideox_sat\.command_line) (convert \w+|[a-z-]+)([^`|#\n]*)")
COMMANDS = {"sample": "sat/sample_video.py", "train": "sat/train_video.py", "train-vae": "sat/train_vae.py"}
COMMANDS |= {"memory": "tools/estimate_memory.py", "web": "tools/web.py"} | {
    f"convert {name}": f"tools/{name}.py" for name in TOOLS
}
PROGRAM = re.compile(r"(?<![\w/])((?:(?:sat|tools|benchmarks)/)?\w+\.(?:py|sh))\b([^`|#\n]*)")
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")
TORCHRUN = ("--standalone", "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint")
OF_OTHERS = ("sat/README.md",)  # in the original's repository
# Programs that take every argument of a command, as their help says.
ARGUMENTS_OF = {
    "tools/precompute_latents.py": ["sat/train_video.py"],
    "tools/estimate_memory.py": ["sat/train_video.py", "sat/sample_video.py"],
}
DECLARED = {
    "sat/sample_video.py": SamplingArguments,
    "sat/train_video.py": TrainingArguments,
    "sat/train_vae.py": VaeTrainingArguments,
}


@cache
def text(guide: str) -> str:
    return (ROOT / guide).read_text().replace("\\\n", " ")


@cache
def flags_of(program: str) -> set[str]:
    """Return the flags in a program's `--help` and those of the commands it forwards to."""
    command = [sys.executable, str(ROOT / program), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(FLAG.findall(shown)).union(*(flags_of(other) for other in ARGUMENTS_OF.get(program, ())))


def command_lines(guide: str) -> Iterator[tuple[str, str]]:
    """Yield the programs of the repository in a guide, each with the rest of its command."""
    for line in text(guide).splitlines():
        for name, rest in PROGRAM.findall(line):
            program = SCRIPTS.get(name, name if "/" in name else f"tools/{name}")
            if program.endswith(".py") and (ROOT / program).exists():
                yield program, rest
        for name, rest in COMMAND.findall(line):
            if name in ("convert NAME", *COMMANDS):  # the help of `convert` alone is a list of names
                yield COMMANDS[name.replace("convert NAME", "convert merge_lora")], rest


def commands(guide: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the programs of the repository that a guide runs, each with its flags."""
    for program, rest in command_lines(guide):
        yield program, FLAG.findall(rest)


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_flags_are_those_of_the_programs(guide):
    given = {(program, flag) for program, flags in commands(guide) for flag in flags if flag not in TORCHRUN}
    assert not {(program, flag) for program, flag in given if flag not in flags_of(program)}


def test_guides_give_flags():
    given = {guide for guide in GUIDES if any(flags for _, flags in commands(guide))}
    assert {"README.md", "assets/tiny/README.md", "benchmarks/RESULTS.md", "docs/sampling.md", "docs/data.md"} <= given
    assert len(given) > 12


@pytest.mark.parametrize("guide", GUIDES)
def test_command_lines_can_be_parsed(guide):
    for program, rest in command_lines(guide):
        if program in DECLARED:
            parse(program, rest)
            alone = not FLAG.search(rest) or "--help" in rest or ("--input_file" in rest and ".json" in rest)
            assert alone or "--base" in rest, f"{program}{rest} needs --base"


def test_recipes_can_be_parsed():
    recipes = re.findall(r"`(--base [^`]+)`", text("docs/fine_tuning.md"))
    assert len(recipes) > 7
    for recipe in recipes:
        parse("sat/train_video.py", recipe)


def test_a_wrong_value_is_seen():
    with pytest.raises(UserError, match="steps"):
        parse("sat/sample_video.py", "--base configs/cogvideox_5b.yaml --steps many")


def parse(program: str, rest: str) -> None:
    """Read a command line as its program does."""
    words = shlex.split(rest, comments=True)
    if words[-1:] == ["…"] and words[-2:-1] != ["--base"]:
        words.pop()  # whatever else there is
    parser_for(DECLARED[program], "", "").parse_args(words)


@pytest.mark.parametrize("guide", (*GUIDES, "CONTRIBUTING.md"))
def test_named_files_are_there(guide):
    named = set(re.findall(r"\b(?:configs|tools|sat|benchmarks|assets|tests)/[\w./-]*\.\w+\b", text(guide)))
    assert len(named) > 3 or guide.startswith("docs/") or guide in ("CHANGELOG.md", "SECURITY.md")
    assert not {path for path in named if not (ROOT / path).exists() and path not in OF_OTHERS}


SELECTION = re.compile(r"(?:python -m pytest|tests/run\.sh)((?: tests/[\w./-]+)+) -k (\"[^\"]+\"|\w+)")


def test_selections_of_tests_are_not_empty():
    found = [(guide, *match) for guide in GUIDES for match in SELECTION.findall(" ".join(text(guide).split()))]
    assert len(found) > 4
    for guide, files, chosen in found:
        code = "\n".join((ROOT / file).read_text() for file in files.split())
        names = re.findall(r"^def (test_\w+)", code, re.MULTILINE)
        for word in set(re.findall(r"\w+", chosen)) - {"and", "or", "not"}:
            assert any(word in name for name in names), f"{guide}: -k {word} selects nothing in {files}"


def test_a_wrong_flag_is_seen():
    assert "--seed" in flags_of("sat/sample_video.py")
    assert "--sede" not in flags_of("sat/sample_video.py")
    assert ("sat/sample_video.py", ["--base", "--seed"]) in list(commands("docs/sampling.md"))
    assert ("tools/estimate_memory.py", ["--base"]) in list(commands("docs/installing.md")), "as cogvideox memory"
