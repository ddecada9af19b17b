"""Start a worker of pytest-xdist in a process that has PyTorch imported.

    python tests/forked_worker.py -u -c CODE

`tests/run.sh` names this program as the interpreter of the workers. `processes.py` says how a process is forked.
"""

import sys

import processes

if __name__ == "__main__":
    sys.exit(processes.Process(sys.argv[1:]).wait())
