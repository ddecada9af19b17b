"""Run torchrun without its traceback, so that the output ends with that of the processes.

  python tools/torchrun.py --standalone --nproc_per_node=2 sat/train_video.py --base ...

The arguments are torchrun's. Exit codes: that of the first process that failed; after SIGTERM or Ctrl-C, which the
processes had time to handle, 128 plus the signal's number.
"""

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run() -> int:
    logging.disable(logging.ERROR)  # only in the launcher
    try:
        main()
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            sys.stderr.write(f"error: process {rank} was ended by signal {-failure.exitcode}; 9 may mean no memory\n")
            return 128 - failure.exitcode
        return failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(run())
