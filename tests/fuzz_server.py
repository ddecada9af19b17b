"""Runs commands of this repository in processes forked from one that has imported PyTorch, so that each costs little.

As a program it reads one JSON object a line: `command` (`sample_video`, `train_video`, `train_vae`), `arguments`,
`folder` (becomes the current directory) and `log` (takes stdout and stderr). It answers each with one: `code`, the exit
code, negative for a signal, or null where the case took longer than `SECONDS`.
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 20  # of processor time, which a busy machine does not change
PATIENCE = 240  # seconds by the clock, for what waits rather than works
HEAVY = (
    *(f"cogvideox_sat.{package}.run" for package in ("sampling", "training", "vae_training")),
    *("torch._dynamo", "cogvideox_sat.weights.diffusers_names"),
)


class Server:
    """Starts the program and asks it."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def run(self, command: str, arguments: list[str], folder: Path) -> tuple[int | None, str]:
        """Return the exit code of a command and what it printed."""
        log = folder / "log.txt"
        request = {"command": command, "arguments": arguments, "folder": str(folder), "log": str(log)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], log.read_text(errors="replace")

    def close(self) -> None:
        """End the program."""
        self.process.stdin.close()
        self.process.wait(timeout=60)


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "sat")]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print when they are imported
    importlib.import_module("cogvideox_sat.commands.startup").quiet_libraries()
    for name in HEAVY:
        importlib.import_module(name)
    for line in sys.stdin:
        answers.write(json.dumps({"code": run_case(json.loads(line))}) + "\n")
        answers.flush()


def run_case(case: dict[str, Any]) -> int | None:
    """Return the exit code of one case, run in a process of its own."""
    process = os.fork()
    if process == 0:
        os._exit(in_child(case))
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGXCPU else code
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def in_child(case: dict[str, Any]) -> int:
    """Run a command as a process of its own would; the exit code of that."""
    os.setpgid(0, 0)
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))
    log = os.open(case["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False, buffering=1)
    os.chdir(case["folder"])
    try:
        code = importlib.import_module(case["command"]).main(case["arguments"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0


if __name__ == "__main__":
    main()
