"""Run tools that must refuse their arguments."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import processes

TOOLS = Path(__file__).parents[1] / "tools"


def error_of(main: Any, caplog: Any, *arguments: object) -> str:
    """Return the error line of a tool that refuses its arguments."""
    caplog.clear()
    assert main([str(argument) for argument in arguments]) == 2
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert "\n" not in errors[0]
    return errors[0]


# Runs each command line of a JSON list; prints its exit code, its log and whether PyTorch was imported, as JSON.
MISTAKES = """
import importlib, io, json, logging, sys
main = importlib.import_module("tools." + sys.argv[1]).main
results = []
for command in json.load(sys.stdin):
    log = io.StringIO()
    logging.basicConfig(stream=log, force=True, level=logging.INFO, format="%(message)s")
    results.append([main(command), log.getvalue(), "torch" in sys.modules])
print(json.dumps(results))
"""


def assert_told_before_pytorch(tool: str, mistakes: Mapping[str, tuple[Sequence[object], str]]) -> None:
    """Check that a tool answers wrong command lines with one line, without importing PyTorch.

    Args:
        mistakes: by name a command line and a part of the expected line.
    """
    root = TOOLS.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "sat")]), "OMP_NUM_THREADS": "1"}
    commands = json.dumps([[str(word) for word in arguments] for arguments, _ in mistakes.values()])
    run = [sys.executable, "-c", MISTAKES, tool]
    process = subprocess.run(run, input=commands, env=environment, capture_output=True, text=True)
    results = json.loads(process.stdout)
    for (name, (_, says)), (code, log, torch_came_in) in zip(mistakes.items(), results, strict=True):
        assert (code, torch_came_in) == (2, False), (name, log)
        assert log.startswith("error: ") and says in log and log.count("\n") == 1, (name, log)


def error_on_a_full_disk(tool: str, limit: int, *arguments: object) -> str:
    """Return the last line of a tool with `limit` bytes per file, as on a full disk."""
    result = processes.run([TOOLS / tool, *arguments], limits={"RLIMIT_FSIZE": limit})
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    return result.stderr.strip().splitlines()[-1]
