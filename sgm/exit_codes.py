"""The exit code of a command, and the single line of an error; PyTorch is not imported."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from sgm.errors import UserError, one_line
from sgm.memory_errors import memory_guard

_raises: ContextVar[bool] = ContextVar("a program called the command", default=False)


@contextmanager
def errors_raised() -> Iterator[None]:
    """Let `exit_code` raise a command's UserError within the block, for a calling program."""
    token = _raises.set(True)
    try:
        yield
    finally:
        _raises.reset(token)


def exit_code(
    command: Callable[[], int],
    logger: logging.Logger,
    interrupted: str = "interrupted",
    command_line: Sequence[str] | None = None,
) -> int:
    """Run a command and return its exit code.

    The code is 2 for a UserError, which is logged as one line, and 130 if the command is interrupted. Full memory
    counts as a UserError.

    Args:
        command_line: the command's arguments, None for those of the process; `--debug` among them also logs the
            traceback of a UserError.
    """
    try:
        with memory_guard("out of memory"):
            return command()
    except UserError as error:
        if _raises.get():
            raise
        debug = "--debug" in (sys.argv[1:] if command_line is None else command_line)
        logger.error("error: %s", one_line(str(error)), exc_info=error if debug else None)
        return 2
    except KeyboardInterrupt:
        if _raises.get():
            raise
        logger.error(interrupted)
        return 130
