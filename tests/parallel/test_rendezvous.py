"""Processes that nobody joins end with one line; those that meet agree."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

import processes
from distributed import free_port

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
JOIN = """
import logging, os, sys
from datetime import timedelta
from cogvideox_sat.parallel import rendezvous
from cogvideox_sat.commands.launchers import adopt_launcher
from cogvideox_sat.parallel.agreement import any_process, join_processes
from sgm.exit_codes import exit_code

def main():
    adopt_launcher()
    rendezvous.LIMIT = timedelta(seconds=int(os.environ.get("LIMIT", 3)))
    join_processes()
    assert any_process(True)
    return 0

logging.basicConfig(format="%(message)s")
sys.exit(exit_code(main, logging.getLogger()))
"""


def start(**variables: object) -> processes.Process | subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "sat")))
    environment |= {name: str(value) for name, value in variables.items()}
    return processes.start(["-c", JOIN], stderr=subprocess.PIPE, env=environment)


def outcome(process: processes.Process | subprocess.Popen) -> tuple[int, list[str]]:
    _, errors = process.communicate(timeout=90)
    return process.returncode, errors.splitlines()


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_meet():
    variables = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "LIMIT": 60}
    assert [outcome(process)[0] for process in [start(RANK=rank, **variables) for rank in range(2)]] == [0, 0]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "common"),
    [
        (
            ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
            {"OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_LOCAL_SIZE": 2, "PMIX_NAMESPACE": f"test-{os.getpid()}"},
        ),
        (
            ("SLURM_PROCID", "SLURM_LOCALID"),
            {"SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_JOB_ID": os.getpid()},
        ),
    ],
)
def test_processes_of_mpirun_and_srun_meet(rank, common):
    started = [start(LIMIT=60, **common, **dict.fromkeys(rank, number)) for number in range(2)]
    assert [outcome(process)[0] for process in started] == [0, 0]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_of_three():
    """The first process waits for the third, and the second for the word of the first."""
    variables = {"WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "LIMIT": 10}
    for process in [start(RANK=rank, **variables) for rank in range(2)]:
        code, lines = outcome(process)
        assert code == 2, lines
        assert "WORLD_SIZE is 3, but fewer processes connected" in lines[-1] and "within 10 s" in lines[-1]
        assert len(lines) == 1


@pytest.mark.slow
def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        code, lines = outcome(start(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=taken.getsockname()[1]))
    assert code == 2 and "is in use by another program" in lines[-1], lines


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable(monkeypatch, missing):
    from cogvideox_sat.parallel.rendezvous import connect
    from sgm.errors import UserError

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=f"{missing} is not set, but WORLD_SIZE is 2"):
        connect()


@pytest.mark.slow
def test_nobody_listens():
    code, lines = outcome(start(RANK=1, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()))
    assert (code, len(lines)) == (2, 1) and "fewer processes connected" in lines[0]
