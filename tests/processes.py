"""Start Python programs quickly, in processes forked from one with slow imports done.

Such a process is like one with a new interpreter, except for the start time and messages of libraries during import.
Tests use `subprocess` if they test the start itself, measure memory, run another copy of the repository, or set a
variable that Python or a library reads at its start.
"""

import contextlib
import functools
import itertools
import json
import os
import resource
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

ANSWER = struct.Struct("!q")
AT_BIRTH = dict(os.environ)  # without the variables of a test
READ_AT_START = (
    *("PYTHONHASHSEED", "PYTHONWARNINGS", "PYTHONOPTIMIZE", "LD_PRELOAD", "LD_LIBRARY_PATH"),
    *("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE"),
)


def start(words: Sequence[object], **options: Any) -> "Process | subprocess.Popen":
    """Start a Python program, whose `words` follow the interpreter's name.

    OMP_NUM_THREADS is 1.

    Args:
        options: `cwd`, `env`, `stdin`, `stdout`, `stderr` and `start_new_session` of `subprocess.Popen`, with text
            pipes; `limits`, by name of a limit of `resource`.
    """
    if not _has_gpu():
        return Process(list(map(str, words)), **options)
    limits = options.pop("limits", {})
    options["env"] = _environment(options.get("env"))
    return subprocess.Popen(
        [sys.executable, *map(str, words)], text=True, preexec_fn=lambda: _set_limits(limits), **options
    )


def run(
    words: Sequence[object], *, timeout: float | None = None, check: bool = False, **options: Any
) -> subprocess.CompletedProcess:
    """Run such a program to its end, and return its output.

    The result is that of `subprocess.run` with `capture_output`.
    """
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    process = start(words, **options)
    try:
        output, errors = process.communicate(timeout=timeout)
    except BaseException:
        process.kill()
        process.wait()
        raise
    done = subprocess.CompletedProcess(list(words), process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


class Process:
    """A forked process, with the methods of `subprocess.Popen` that tests and torchrun use."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: IO | int | None = None,
        stdout: IO | int | None = None,
        stderr: IO | int | None = None,
        start_new_session: bool = False,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        request = {
            "words": list(words),
            "folder": str(Path(cwd or ".").resolve()),
            "environment": _environment(env),
            "new_session": start_new_session,
            "limits": dict(limits or {}),
        }
        self.returncode: int | None = None
        self._readers: list[threading.Thread] = []
        self._outputs: dict[IO, str] = {}
        with contextlib.ExitStack() as files:
            self.stdin, read = _standard(files, stdin, 0, "w")
            self.stdout, written = _standard(files, stdout, 1, "r")
            merged = stderr == subprocess.STDOUT
            self.stderr, errors = (None, written) if merged else _standard(files, stderr, 2, "r")
            self._connection = socket.socket(socket.AF_UNIX)
            self._connection.connect(Servers.address())
            content = json.dumps(request).encode()
            socket.send_fds(self._connection, [len(content).to_bytes(8)], [read, written, errors])
            self._connection.sendall(content)
        self.pid = self._answer()

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process, at most `timeout` seconds, and return its exit code."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired("a forked process", timeout or 0)
            self.returncode = self._answer()
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """Wait for the end of the process and its pipes; return their remaining content."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self.stdin:
            self.stdin.close()
        pipes = [pipe for pipe in (self.stdout, self.stderr) if pipe]
        if not self._readers:  # they still read if an earlier call timed out
            for pipe in pipes:
                reader = threading.Thread(
                    target=lambda pipe=pipe: self._outputs.update({pipe: pipe.read()}), daemon=True
                )
                self._readers.append(reader)
                reader.start()
        for reader in self._readers:
            reader.join(None if deadline is None else max(deadline - time.monotonic(), 0))
            if reader.is_alive():
                raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        self.wait(None if deadline is None else max(deadline - time.monotonic(), 0))
        for pipe in pipes:
            pipe.close()
        return tuple(self._outputs.get(pipe) for pipe in (self.stdout, self.stderr))

    def _read(self, pipe: IO) -> None:
        self._outputs[pipe] = pipe.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _answer(self) -> int:
        content = self._connection.recv(ANSWER.size, socket.MSG_WAITALL)
        if len(content) < ANSWER.size:
            raise RuntimeError("tests/process_server.py has ended")
        return ANSWER.unpack(content)[0]


def _standard(files: contextlib.ExitStack, given: IO | int | None, own: int, mode: str) -> tuple[IO | None, int]:
    """Return our end of a requested pipe, and the process's end, which `files` closes."""
    if given == subprocess.PIPE:
        read, write = os.pipe()
        ours, theirs = (write, read) if mode == "w" else (read, write)
        files.callback(os.close, theirs)
        return os.fdopen(ours, mode), theirs
    if given == subprocess.DEVNULL:
        null = os.open(os.devnull, os.O_RDWR)
        files.callback(os.close, null)
        return None, null
    if given is None:
        return None, own
    return None, given if isinstance(given, int) else given.fileno()


def _environment(given: Mapping[str, str] | None) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": "1", **(os.environ if given is None else given)}
    assert environment["OMP_NUM_THREADS"] == "1", "PyTorch reads it on import; use subprocess"
    for name in READ_AT_START:
        assert environment.get(name) == AT_BIRTH.get(name), f"{name} is read when a process starts; use subprocess"
    return environment


@functools.cache
def _has_gpu() -> bool:
    """Return whether the machine has a GPU.

    Imports may look for CUDA, which a forked process cannot use afterwards.
    """
    import torch

    return torch.cuda.is_available()


def _set_limits(limits: Mapping[str, int]) -> None:
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, name), (limit, limit))


class Servers:
    """The two servers of a test run, started on first use and shared by its processes.

    Processes take turns, since those of one server have equal string hashes, and thus order sets alike.
    """

    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", f"{os.getpid()}-{time.monotonic_ns()}")
    turns = itertools.cycle(range(2))
    held: ClassVar[dict[int, socket.socket]] = {}

    @classmethod
    def address(cls) -> str:
        """Return the address of the next server."""
        number = next(cls.turns)
        address = f"\0cogvideox-tests-{cls.run}-{number}"
        while number not in cls.held:
            with socket.socket(socket.AF_UNIX) as listener, contextlib.suppress(OSError):  # already started by another
                listener.bind(address)
                cls.start(listener)
            cls.hold(number, address)
        return address

    @classmethod
    def start(cls, listener: socket.socket) -> None:
        listener.listen(64)
        program = Path(__file__).with_name("process_server.py")
        environment = {**AT_BIRTH, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.Popen(
            [sys.executable, str(program), str(listener.fileno()), cls.run],
            **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL),
            env=environment,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )

    @classmethod
    def hold(cls, number: int, address: str) -> None:
        """Keep the server running until this process ends; do nothing if it has ended."""
        connection = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):
            connection.connect(address)
            connection.sendall(bytes(8))
            if connection.recv(ANSWER.size, socket.MSG_WAITALL):
                cls.held[number] = connection
                return
        connection.close()
