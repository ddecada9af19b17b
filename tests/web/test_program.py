"""Programs beside the page: their output, the line that they end with, and their end."""

import signal
import sys

import pytest

from cogvideox_sat.web.program import Program, training_words

PYTHON = [sys.executable, "-c"]


def test_output_and_the_last_error_are_kept():
    text = "print('\\x1b[31mred\\x1b[0m'); print('1%\\r2%'); print('error: lr is 7'); raise SystemExit(2)"
    program = Program([*PYTHON, text])
    assert program.wait(30) == 2
    assert program.log() == ["red", "2%", "error: lr is 7"]
    assert program.error == "lr is 7"


def test_output_is_kept_apart():
    program = Program([*PYTHON, "import sys; print('{}'); sys.stderr.write('said\\n')"], capture=True)
    assert program.wait(30) == 0
    assert (program.output, program.log()) == ("{}\n", ["said"])


def test_only_the_last_lines_are_kept():
    program = Program([*PYTHON, "print('x' * 9999); [print(i) for i in range(300)]"])
    program.wait(30)
    assert len(program.log()) == 200
    assert program.log()[-1] == "299"


def test_it_is_stopped():
    program = Program([*PYTHON, "import time; print('there', flush=True); time.sleep(60)"])
    assert program.wait(0.01) is None
    assert program.code is None
    program.stop()
    assert program.wait(30) == -signal.SIGTERM
    program.stop()  # a second time is no mistake


def test_keys_of_services_are_not_passed_on(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("COGVIDEOX_WEB_AUTH", "ann:secret password")
    program = Program([*PYTHON, "import os; print(sorted(os.environ.values()))"])
    program.wait(30)
    assert "secret" not in "".join(program.log())


@pytest.mark.parametrize(("processes", "launcher"), [(1, []), (2, ["-m", "torch.distributed.run", "--standalone"])])
def test_training_is_started_as_the_command_is(processes, launcher):
    words = training_words(processes)
    assert words[0] == sys.executable
    assert words[1 : 1 + len(launcher)] == launcher
    assert words[-1].endswith("train_video.py")
