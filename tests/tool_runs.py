"""Running tools that are to refuse."""

from pathlib import Path
from typing import Any

import processes

TOOLS = Path(__file__).parents[1] / "tools"


def error_of(main: Any, caplog: Any, *arguments: object) -> str:
    """The one line of a tool that refuses."""
    caplog.clear()
    assert main([str(argument) for argument in arguments]) == 2
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert "\n" not in errors[0]
    return errors[0]


def error_on_a_full_disk(tool: str, limit: int, *arguments: object) -> str:
    """The last line of a tool whose files may have `limit` bytes at most, which fails as on a full disk."""
    result = processes.run([TOOLS / tool, *arguments], limits={"RLIMIT_FSIZE": limit})
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    return result.stderr.strip().splitlines()[-1]
