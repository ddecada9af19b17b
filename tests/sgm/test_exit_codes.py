"""Exit codes of commands, and the one line that a user sees."""

import logging

import pytest

from sgm.errors import UserError
from sgm.exit_codes import exit_code

logger = logging.getLogger("command")


def raising(error: BaseException):
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("lr: wrong\nvalue"), 2, "error: lr: wrong value"),
        (MemoryError(), 2, "error: out of memory"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_what_a_user_can_mend_is_one_line(caplog, error, code, line):
    assert exit_code(raising(error), logger, interrupted="stopped", command_line=[]) == code
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(line)
    assert not caplog.records[0].exc_info


def test_debug_shows_the_traceback(caplog):
    assert exit_code(raising(UserError("wrong")), logger, command_line=["--debug"]) == 2
    assert caplog.records[0].exc_info


def test_a_command_has_its_own_code_and_mistakes_of_ours_keep_their_traceback():
    assert exit_code(lambda: 1, logger) == 1
    with pytest.raises(ZeroDivisionError):
        exit_code(raising(ZeroDivisionError()), logger)
