"""The command refuses unsafe or missing things in one line, before opening anything."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from cogvideox_sat.web import command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def served(monkeypatch):
    """Return the options of pages that were to be served."""
    from cogvideox_sat.web import server

    seen = []
    monkeypatch.setattr(server, "serve", seen.append)
    return seen


def test_by_itself_it_serves_the_tiny_models_to_this_machine(served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main([]) == 0
    (options,) = served
    assert list(options.models) == ["tiny", "tiny_i2v", "tiny_continue"]
    assert (options.host, options.port, options.users) == ("127.0.0.1", 7860, {})
    assert options.output_dir == tmp_path / "outputs" / "web"
    assert not options.output_dir.exists()


def test_arguments_reach_it(served, tmp_path):
    users = tmp_path / "users"
    users.write_text("ann:long password\n")
    users.chmod(0o600)
    given = ["--model", "tiny", "--host", "0.0.0.0", "--auth", users, "--port", "0", "--names", "gpu.example"]
    given += ["--adapters", tmp_path, "--upload_limit", "5", "--device", "cpu", "--output_dir", tmp_path / "out"]
    assert command.main(list(map(str, given))) == 0
    (options,) = served
    assert options.models["tiny"].settings == {"device": "cpu"}
    assert (options.users, options.names, options.upload_limit) == (
        {"ann": "long password"},
        ("gpu.example",),
        5 * 2**20,
    )


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--host", "0.0.0.0"], "host: 0.0.0.0 can be reached by others; give --auth too"),
        (["--host", "::"], "host: :: can be reached by others"),
        (["--port", "70000"], "port: got 70000; expected a number from 0 to 65535"),
        (["--port", "x"], "argument --port: invalid int value: 'x'"),
        (["--upload_limit", "0"], "upload_limit: got 0; expected MiB from 1 to 4096"),
        (["--adapters", "/missing"], "adapters: the folder /missing does not exist; make it, or name another"),
        (["--model", "tinny"], "model: tinny does not exist; did you mean tiny?"),
        (["--model", "tiny", "--model", "tiny"], "model: two are called tiny"),
        (["--dtype", "int8"], "dtype: got 'int8'"),
        (["--auth", "/missing"], "auth: /missing cannot be read"),
        (["--share"], "unrecognized arguments: --share"),
    ],
)
def test_mistakes_are_one_line(served, caplog, given, line):
    assert command.main(given) == 2
    assert not served
    (record,) = caplog.records
    assert record.getMessage().startswith(f"error: {line}")


@pytest.mark.parametrize("program", [["tools/web.py"], ["-m", "cogvideox_sat.command_line", "web"]])
def test_help_is_quick_and_names_the_command(program, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'sat'}:{ROOT}")
    begin = time.process_time()
    result = subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--auth" in result.stdout
    assert time.process_time() - begin < 2
