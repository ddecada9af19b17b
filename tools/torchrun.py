"""Run torchrun without its traceback, so that the output ends with that of the processes.

  python tools/torchrun.py --standalone --nproc_per_node=2 sat/train_video.py --base ...

The arguments are torchrun's. A script is looked for in the current working directory, then in the repository. Exit
codes: 2 if the script does not exist, else that of the first process that failed; after SIGTERM or Ctrl-C, which the
processes had time to handle, 128 plus the signal's number.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, main

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "sat")]

from cogvideox_sat.commands.input_paths import required_input, tell_places  # noqa: E402
from sgm.errors import UserError  # noqa: E402


def run() -> int:
    try:
        words = with_located_script(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    tell_places()
    logging.disable(logging.ERROR)  # only in the launcher
    try:
        main(words)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            sys.stderr.write(f"error: process {rank} was ended by signal {-failure.exitcode}; 9 may mean no memory\n")
            return 128 - failure.exitcode
        return failure.exitcode
    return 0


def with_located_script(words: Sequence[str]) -> list[str]:
    """Return torchrun's command line, with the script replaced by the file that it names.

    A module (`-m`) and a program that is not Python's (`--no_python`) stay as they are.

    Raises:
        UserError: the script exists neither in the current working directory nor in the repository.
    """
    options = get_args_parser().parse_args(words)
    if options.module or options.no_python:
        return list(words)
    script = required_input(options.training_script, "script")
    place = len(words) - len(options.training_script_args) - 1
    return [*words[:place], str(script), *words[place + 1 :]]


if __name__ == "__main__":
    sys.exit(run())
