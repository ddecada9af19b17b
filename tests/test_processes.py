"""A forked process is like one with a new interpreter."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import processes

pytestmark = pytest.mark.slow  # the servers start

SHOWN = """
import json, os, sys, __main__
print(json.dumps([sys.argv, sys.path[0], os.getcwd(), sorted(os.environ.items()), __name__,
                  __main__ is sys.modules["__main__"], __main__.__dict__.get("__file__"), os.getsid(0) == os.getpid(),
                  sys.stdin.read()]))
print("said", file=sys.stderr)
"""


def both(words: list[object], **options) -> list[subprocess.CompletedProcess]:
    """Run a program in a forked process and in a new one."""
    # Without it, a new process would also get variables that libraries have set outside of `os.environ`.
    new = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "env": dict(os.environ), **options}
    return [processes.run(words, **options), subprocess.run([sys.executable, *map(str, words)], **new)]


def test_arguments_environment_folder_and_files(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "shown.py").write_text(SHOWN)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path), "LC_CTYPE": "C.UTF-8", "MINE": "ä b"}
    for words in (["-c", SHOWN, "a b", 3], [tmp_path / "shown.py", "x"], ["-u", "shown.py"], ["-m", "shown", "y"]):
        for options in ({"cwd": tmp_path}, {"cwd": tmp_path, "env": environment}, {"cwd": "/", "start_new_session": 1}):
            if options["cwd"] == "/" and words[0] in ("-u", "-m"):
                continue
            forked, new = both(words, **options)
            assert (forked.returncode, new.returncode) == (0, 0), forked.stderr
            assert forked.stdout == new.stdout
            assert forked.stderr == new.stderr == "said\n"


@pytest.mark.parametrize(
    ("program", "code", "errors"),
    [
        ("", 0, ""),
        ("raise SystemExit", 0, ""),
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('why')", 1, "why"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import os; os._exit(3)", 3, ""),
        ("import os; os.abort()", -signal.SIGABRT, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", -signal.SIGINT, "Interrupt"),
        ("import atexit, sys; atexit.register(print, 'last', file=sys.stderr)", 0, "last"),
        ("import threading, sys; threading.Timer(0.2, print, ['t'], {'file': sys.stderr}).start()", 0, "t"),
    ],
)
def test_ends(program, code, errors):
    for done in both(["-c", program]):
        assert done.returncode == code
        assert errors in done.stderr.splitlines()[-1] if errors else not done.stderr


def test_signals_and_waiting():
    program = "import signal, sys, time; signal.signal(15, lambda *_: (print('bye'), sys.exit(5)))\n"
    program += "print('ready', flush=True)\n"
    process = processes.start(["-c", program + "time.sleep(60)"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.1)
    os.kill(process.pid, 0)
    process.terminate()
    assert process.communicate(timeout=30) == ("bye\n", None)
    assert process.wait() == process.poll() == 5
    process.kill()  # after its end
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run(["-c", "import time; time.sleep(60)"], timeout=0.1)


def test_files(tmp_path):
    """Standard output may be a file, and errors may go to it too."""
    with (tmp_path / "log").open("w") as log:
        process = processes.start(
            ["-c", "import sys; print(sys.stdin.read(), flush=True); print('e', file=sys.stderr)"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        process.stdin.write("given")
        assert process.communicate() == (None, None)
    assert (tmp_path / "log").read_text() == "given\ne\n"


def test_limits(tmp_path):
    program = f"open({str(tmp_path / 'file')!r}, 'wb', buffering=0).write(bytes(2000)); raise SystemExit(4)"
    done = processes.run(["-c", program], limits={"RLIMIT_FSIZE": 1000})
    assert done.returncode == 4 and (tmp_path / "file").stat().st_size == 1000
    assert processes.run(["-c", "while True: pass"], limits={"RLIMIT_CPU": 1}).returncode != 0


def test_random_numbers_and_the_order_of_sets_differ():
    program = "import numpy, random, tempfile, torch\n"
    program += "print(numpy.random.rand(), random.random(), tempfile.mktemp(), torch.rand(1), sep='\\n')\n"
    program += "print(*{str(i) for i in range(99)})"
    outputs = [processes.run(["-c", program]).stdout.splitlines() for _ in range(4)]
    for values in list(zip(*outputs, strict=True))[:4]:
        assert len(set(values)) == 4
    assert outputs[0][4] != outputs[1][4] != outputs[2][4]


def test_nothing_of_one_process_is_left_for_the_next():
    program = "import sgm, os; print(hasattr(sgm, 'mark'), os.environ.get('MARK')); sgm.mark = os.environ['MARK'] = '1'"
    root = {"cwd": Path(__file__).parents[1]}
    assert {processes.run(["-c", program], **root).stdout for _ in range(4)} == {"False None\n"}


def test_what_only_a_new_interpreter_obeys_is_refused():
    for name in ("OMP_NUM_THREADS", "PYTHONHASHSEED", "CUDA_VISIBLE_DEVICES", "HF_HOME"):
        with pytest.raises(AssertionError, match="use subprocess"):
            processes.Process(["-c", ""], env={**os.environ, name: "3"})


def test_the_server_has_computed_nothing():
    """The server has the thread of a library's memory pool, but none of PyTorch's."""
    program = "import os; from pathlib import Path\n"
    program += "print(*{Path(f'/proc/{os.getppid()}/task/{t}/comm').read_text().strip()"
    program += " for t in os.listdir(f'/proc/{os.getppid()}/task')})"
    names = set(processes.Process(["-c", program], stdout=subprocess.PIPE).communicate()[0].split())
    assert names <= {"python", "python3", "jemalloc_bg_thd"} and len(names) <= 2
