"""Start a command before PyTorch is imported, with quiet libraries and one-line errors."""

import logging
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from cogvideox_sat.commands.input_paths import tell_places
from cogvideox_sat.commands.launchers import adopt_launcher, is_first_process
from sgm.errors import UserError
from sgm.exit_codes import exit_code

# Seconds that the first of several processes has to report an error that all of them find. Its launcher then ends the
# other processes, which would report the same.
FIRST_REPORTS_WITHIN = 5


def quiet_libraries() -> None:
    """Keep messages that libraries print at import off the terminal, except errors."""
    os.environ.setdefault("SAT_LOGLEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of transformers, while it loads the text encoder
    # A filter, because DeepSpeed sets the level of its logger itself.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def run_command(
    plan: Callable[[], Any],
    train: Callable[[Any], int],
    logger: logging.Logger,
    command_line: Sequence[str] | None = None,
) -> int:
    """Return the exit code of `train(plan())`.

    Args:
        plan: a function that reads only arguments and files, and raises UserError for a mistake in them.
        train: a function that does the work and returns an exit code.
        command_line: see `exit_code`.
    """
    leads = is_first_process()
    logging.basicConfig(level=logging.INFO if leads else logging.ERROR, format="%(message)s")

    def command() -> int:
        try:
            adopt_launcher()
            planned = plan()
        except UserError:
            if not leads:
                time.sleep(FIRST_REPORTS_WITHIN)
            raise
        tell_places()
        return train(planned)

    return exit_code(command, logger, command_line=command_line)
