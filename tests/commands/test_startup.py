"""Test that a command's mistakes are one line, of the first process, and exit code 2."""

import logging

import pytest

from cogvideox_sat.commands import startup
from sgm.errors import UserError

logger = logging.getLogger("a command")


@pytest.fixture
def alone(monkeypatch):
    """Remove the variables of launchers."""
    monkeypatch.setattr(startup, "adopt_launcher", lambda: None)
    monkeypatch.setattr(startup, "is_first_process", lambda: True)


def refuse():
    raise UserError("lr: -1 is negative; give a positive number")


def test_what_is_planned_is_run_and_its_exit_code_returned(alone):
    planned = object()
    assert startup.run_command(lambda: planned, lambda given: 1 if given is planned else 0, logger) == 1


def test_a_mistake_is_one_line_and_nothing_runs(alone, caplog):
    assert startup.run_command(refuse, lambda _: pytest.fail("it ran"), logger, command_line=[]) == 2
    assert [record.getMessage() for record in caplog.records] == ["error: lr: -1 is negative; give a positive number"]
    assert not caplog.records[0].exc_info


def test_debug_shows_where_a_mistake_was_found(alone, caplog):
    assert startup.run_command(refuse, lambda _: 0, logger, command_line=["--debug"]) == 2
    assert caplog.records[0].exc_info


@pytest.mark.parametrize(("first", "waits"), [(True, []), (False, [startup.FIRST_REPORTS_WITHIN])])
def test_the_other_processes_leave_the_first_one_time_to_tell(alone, monkeypatch, first, waits):
    slept: list[float] = []
    monkeypatch.setattr(startup, "is_first_process", lambda: first)
    monkeypatch.setattr(startup.time, "sleep", slept.append)
    assert startup.run_command(refuse, lambda _: 0, logger, command_line=[]) == 2
    assert slept == waits


def test_libraries_keep_quiet_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("SAT_LOGLEVEL", raising=False)
    startup.quiet_libraries()
    assert startup.os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert startup.os.environ["SAT_LOGLEVEL"] == "ERROR"
