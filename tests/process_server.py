"""Fork processes that have imported PyTorch and other slow packages.

This program is the server behind `processes.py`. Its argument is the file descriptor of a listening socket, whose
connections ask for processes or hold the server; the server ends when none holds it. Each connection sends eight bytes,
a length. Length 0 holds the server, which answers once. Otherwise the eight bytes come with the standard input, output
and error of a process, followed by a `Request` as JSON; the answers are the number of the process and, at its end, its
exit code as in `subprocess`. An answer is a `processes.ANSWER`.

The server never computes, since a process that is forked after PyTorch has started threads hangs when it uses them.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import processes

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    *(f"cogvideox_sat.{package}.run" for package in ("sampling", "training", "vae_training")),
    *("cogvideox_sat.weights.diffusers_names", "torch._dynamo", "torch.distributed.run", "pytest"),
    *("cogvideox_sat.media.pyav_reading", "vae_modules.cp_enc_dec", "transformers.models.t5.modeling_t5", "setuptools"),
)

# Gives each new process its own random numbers, for libraries that do it on import; `random` does it on a fork.
SEEDS: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda numpy: numpy.random.seed(),
    "torch": lambda torch: torch.default_generator.seed(),
}


@dataclass(frozen=True)
class Request:
    """One process; `words` are the command line after the interpreter's name."""

    words: list[str]
    folder: str
    environment: dict[str, str]
    new_session: bool = False
    limits: dict[str, int] = field(default_factory=dict)  # names of `resource`, such as RLIMIT_CPU


class Server:
    """The running processes, and the connections that hold the server."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ)
        self.running: dict[int, tuple[int, socket.socket]] = {}  # by process: its pidfd and the waiting connection
        self.holders: set[socket.socket] = set()

    def serve(self) -> Request | None:
        """Fork a process for each request until no connection holds the server.

        Returns:
            In a new process its request, in the server None at the end.
        """
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    request = self.accept()
                    if request is not None:
                        return request
                elif key.data is not None:
                    self.report(key.data)
                else:
                    self.selector.unregister(key.fileobj)
                    self.holders.remove(key.fileobj)
                    key.fileobj.close()
                    if not self.holders:
                        for process in self.running:
                            os.kill(process, signal.SIGKILL)
                        return None

    def accept(self) -> Request | None:
        connection, _ = self.listener.accept()
        head, standard, _, _ = socket.recv_fds(connection, 8, 3)
        if not standard:
            self.holders.add(connection)
            self.selector.register(connection, selectors.EVENT_READ)
            answer(connection, os.getpid())
            return None
        with connection.makefile("rb") as file:
            request = Request(**json.loads(file.read(int.from_bytes(head))))
        process = os.fork()
        if process == 0:
            self.leave()
            connection.close()
            become(request, standard)
            return request
        for descriptor in standard:
            os.close(descriptor)
        answer(connection, process)
        descriptor = os.pidfd_open(process)
        self.running[process] = descriptor, connection
        self.selector.register(descriptor, selectors.EVENT_READ, process)
        return None

    def report(self, process: int) -> None:
        """Report a process's exit code to the waiting connection."""
        descriptor, connection = self.running.pop(process)
        answer(connection, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        self.selector.unregister(descriptor)
        os.close(descriptor)
        connection.close()

    def leave(self) -> None:
        """Close the server's files in a new process."""
        self.selector.close()
        self.listener.close()
        for descriptor, connection in self.running.values():
            os.close(descriptor)
            connection.close()
        for connection in self.holders:
            connection.close()


def answer(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the waiting connection may be closed
        connection.sendall(processes.ANSWER.pack(number))


def become(request: Request, standard: list[int]) -> None:
    """Give this process the arguments, files and environment of the request."""
    for target, descriptor in enumerate(standard):
        os.dup2(descriptor, target)
    for descriptor in standard:
        os.close(descriptor)
    if request.new_session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    for module, seed in SEEDS.items():
        if module in sys.modules:
            seed(sys.modules[module])
    for name, limit in request.limits.items():
        resource.setrlimit(getattr(resource, name), (limit, limit))


def run_program(words: list[str], paths: list[str]) -> None:
    """Run a command line: a script, `-m MODULE` or `-c CODE`, optionally after `-u`."""
    if words[0] == "-u" or os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
        words = words[words[0] == "-u" :]
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[:] = [str(Path.cwd()), *given, *paths]
        if words[1] == "torch.distributed.run":
            fork_ranks()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    program = types.ModuleType("__main__")
    if words[0] == "-c":
        source, name, first = words[1], "<string>", ""
        sys.argv = ["-c", *words[2:]]
    else:
        source, name, first = Path(words[0]).read_bytes(), words[0], str(Path(words[0]).resolve().parent)
        sys.argv = list(words)
        program.__file__ = str(Path(name).absolute())
    sys.path[:] = [first, *given, *paths]
    sys.modules["__main__"] = program
    exec(compile(source, name, "exec"), program.__dict__)


def end(error: BaseException | None) -> None:
    """End this process as Python ends a program, with an error or without.

    Modules are not torn down, which would take a second, mostly to copy shared memory.
    """
    code: object = 0
    if isinstance(error, SystemExit):
        code = error.code or 0
        if not isinstance(code, int):
            sys.stderr.write(f"{code}\n")
            code = 1
    elif error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()  # waits for threads that are not daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(int(code) & 0xFF)


def fork_ranks() -> None:
    """Let torchrun, in this process, get its processes from the server."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = lambda args, **options: processes.Process(args[1:], **options)


def main() -> None:
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [path for path in sys.path[1:] if path not in given]
    sys.path[:0] = [str(ROOT), str(ROOT / "sat")]
    failure = ""
    gc.disable()  # imports create many objects and no garbage
    try:
        importlib.import_module("cogvideox_sat.commands.startup").quiet_libraries()
        for name in HEAVY:
            importlib.import_module(name)
    except Exception:
        failure = traceback.format_exc()
    gc.collect()
    gc.freeze()  # otherwise the first collection of each process would copy the shared memory
    gc.enable()
    listener = socket.socket(fileno=int(sys.argv[1]))
    processes.Servers.run = sys.argv[2]
    request = Server(listener).serve()
    if request is None:
        return
    try:
        if failure:
            sys.exit(f"what tests/process_server.py imports fails:\n{failure}")
        run_program(request.words, paths)
    except BaseException as error:
        end(error)
    end(None)


if __name__ == "__main__":
    main()
