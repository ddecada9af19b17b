"""The one exception type that a command line turns into a single line for its user, and the words for such lines."""

import logging
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Sequence


class UserError(Exception):
    """A mistake the user can mend: its message says what is wrong, where, and what would fit, on one line."""


def some(names: Iterable[object], shown: int = 3) -> str:
    """The first few of `names` and how many more there are, for a message."""
    names = [str(name) for name in names]
    more = f" ... and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def shown(value: object, most: int = 80) -> str:
    """Return a value as a message shows it: its `repr`, cut where it is long."""
    text = repr(value) if isinstance(value, str) else _SHORT.repr(value)
    return text if len(text) <= most else f"{text[: most - 4]} ..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def one_line(text: str, most: int = 2000) -> str:
    """Return a message without line breaks and control characters, which a value in it may have, and cut to `most`."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: " " if match[0] == "\n" else repr(match[0])[1:-1], text)
    return text if len(text) <= most else f"{text[:most]} ..."


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
    from sgm.memory_errors import memory_guard  # which needs UserError

    try:
        with memory_guard("out of memory"):
            return command()
    except UserError as error:
        debug = "--debug" in (sys.argv[1:] if command_line is None else command_line)
        logger.error("error: %s", one_line(str(error)), exc_info=error if debug else None)
        return 2
    except KeyboardInterrupt:
        logger.error(interrupted)
        return 130
