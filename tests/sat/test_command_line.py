"""`cogvideox NAME` is the script of that name, and a mistake before that is one line."""

import importlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import sample_video
from cogvideox_sat.command_line import COMMANDS, main
from cogvideox_sat.commands.program_names import TOOLS
from cogvideox_sat.tool_commands import merge_lora

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("words", "module", "rest"),
    [
        (["sample", "--base", "a.yaml"], sample_video, ["--base", "a.yaml"]),
        (["sample"], sample_video, []),
        (["convert", "merge-lora", "--load", "x"], merge_lora, ["--load", "x"]),
        (["convert", "merge_lora", "--help"], merge_lora, ["--help"]),
    ],
)
def test_a_command_gets_the_rest_of_the_line(monkeypatch, words, module, rest):
    given = []
    monkeypatch.setattr(module, "main", lambda arguments: given.append(arguments) or 1)
    before = list(sys.argv)
    assert main(words) == 1
    assert given == [rest]
    assert sys.argv == before, "the process is that of who called"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "error: cogvideox: the command: missing; name one of sample, train, train-vae, convert, web, memory"),
        (["smaple"], "error: cogvideox: 'smaple' does not exist; did you mean sample?"),
        (["train_vea", "--help"], "error: cogvideox: 'train_vea' does not exist; did you mean train-vae?"),
        (["--base", "x"], "error: cogvideox: '--base' does not exist; name one of sample, train,"),
        (["convert"], "error: cogvideox convert: the conversion: missing; name one of convert_weight_hf2sat,"),
        (["convert", "merge-lroa"], "error: cogvideox convert: 'merge-lroa' does not exist; did you mean merge_lora?"),
    ],
)
def test_another_name_is_one_line(words, line, caplog):
    assert main(words) == 2
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(line)


def test_help_lists_what_there_is(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert main(["convert", "-h"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in TOOLS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "0.1.0\n"


def test_as_a_program_it_is_named_as_it_was_called():
    """So torchrun starts it: `-m`, in a process of its own."""
    command = [sys.executable, "-m", "cogvideox_sat.command_line", "train", "--help"]
    result = subprocess.run(command, cwd=ROOT / "sat", capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert result.stdout.startswith("usage: cogvideox train [-h]"), result.stderr
    assert "for example: cogvideox train --base" in result.stdout


def test_of_several_processes_the_first_one_speaks():
    """A command sets up the log itself, by its place among the processes."""
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    code = "import logging, sys, train_video\nfrom cogvideox_sat.command_line import main\n"
    code += "level = lambda line: sys.exit(logging.getLogger('train_video').getEffectiveLevel())\n"
    code += "train_video.plan = level\nmain(['train'])"
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'sat'}"}
    result = subprocess.run([sys.executable, "-c", code], env={**path, **variables}, capture_output=True, text=True)
    assert result.returncode == logging.ERROR, result.stderr


def test_every_conversion_is_a_script_too():
    """The script has the same `main`, and every command a module with one."""
    for tool in TOOLS:
        script = importlib.import_module(f"tools.{tool}")
        module = importlib.import_module(f"cogvideox_sat.tool_commands.{tool}")
        assert script.main is module.main
        for name in script.__all__:
            assert getattr(script, name) is getattr(module, name)
    for _, module in COMMANDS.values():
        assert not module or callable(importlib.import_module(module).main)
