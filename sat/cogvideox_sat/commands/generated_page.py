"""Run a tool that writes a page of the guides from the code."""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cogvideox_sat.commands.tool_parser import ToolParser
from sgm.exit_codes import exit_code


def run_page_tool(
    arguments: Sequence[str] | None, description: str, path: Path, page: Callable[[], str], logger: logging.Logger
) -> int:
    """Write a page, or with `--check` compare it with its file; return the exit code.

    Args:
        arguments: the command line; None: that of this process.
        description: docstring of the tool, shown by `--help`.
        path: the page's file.
        page: returns the page's text.

    Returns:
        0, or 1 if `--check` found another text or no file.
    """

    def run() -> int:
        parser = ToolParser(description)
        parser.add_argument("--check", action="store_true", help="write nothing")
        options = parser.parse_args(arguments)
        text = page()
        if options.check:
            return 0 if path.is_file() and path.read_text(encoding="utf-8") == text else 1
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return 0

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return exit_code(run, logger, command_line=arguments)
