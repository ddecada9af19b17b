"""Programs that the page starts, with their output and their last line on failure."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from cogvideox_sat.files.shipped import ROOT

LINES = 200  # of output that are kept
LONGEST_LINE = 500  # characters
ERROR = "error: "
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and movements of a terminal


class Program:
    """A program that runs beside the page.

    Attributes:
        folder: where files that it writes for the page go.

    Args:
        words: what to start.
        capture: keep its standard output apart, as `output`.
    """

    def __init__(self, words: Sequence[str], capture: bool = False):
        self._lines: deque[str] = deque(maxlen=LINES)
        self.error = ""
        self.output = ""
        self.process = subprocess.Popen(
            list(words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if capture else subprocess.STDOUT,
            env=environment(),
            start_new_session=True,  # an interruption of the page is passed on once, by `stop`
        )
        told = self.process.stderr if capture else self.process.stdout
        assert told is not None, "it is a pipe"
        # Lines of a terminal, in which "\r" begins the same line anew
        text = io.TextIOWrapper(told, encoding="utf-8", errors="replace", newline="\n")
        self._readers = [threading.Thread(target=self._read, args=(text,), daemon=True)]
        if capture:
            self._readers.append(threading.Thread(target=self._keep, daemon=True))
        for reader in self._readers:
            reader.start()

    def _read(self, stream: io.TextIOWrapper) -> None:
        for line in stream:
            text = ESCAPES.sub("", line.rstrip()).rpartition("\r")[2].rstrip()[:LONGEST_LINE]
            if text.startswith(ERROR):
                self.error = text.removeprefix(ERROR)
            if text:
                self._lines.append(text)

    def _keep(self) -> None:
        assert self.process.stdout is not None, "it is a pipe"
        self.output = self.process.stdout.read().decode(errors="replace")

    @property
    def code(self) -> int | None:
        """Return the exit code; None: it runs."""
        return self.process.poll()

    def log(self) -> list[str]:
        """Return the last lines of what it says."""
        return list(self._lines)

    def wait(self, seconds: float) -> int | None:
        """Return the exit code after the program has ended and all its output was read.

        The result is None if the program still runs after the timeout.
        """
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        for reader in self._readers:
            reader.join(5)
        return code

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask it, and the processes that it has started, to end."""
        if self.code is None:
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                return


def training_words(processes: int) -> list[str]:
    """Return what starts the command that trains."""
    program = find_spec("train_video")
    assert program is not None and program.origin, "it belongs to the package"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, program.origin]


def environment() -> dict[str, str]:
    """Return the environment of a program, with this package and without service keys."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "COGVIDEOX_WEB_"))}
    places = [str(ROOT), str(ROOT / "sat"), *filter(None, [kept.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(places)} if Path(ROOT, "sat").is_dir() else kept
