"""The exit code of a command, and the one line that a user sees of an error. Nothing here imports PyTorch."""

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
    """Let `exit_code` raise the UserError of a command within the block, for the program that called it."""
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
    """Run a command: its own exit code; 2 for a UserError, whose line is logged; 130 when it is interrupted.

    Memory that is full is a UserError too.

    Args:
        command_line: what the command was given, None for the process's own; with `--debug` in it the traceback of a
            UserError is logged too.
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
