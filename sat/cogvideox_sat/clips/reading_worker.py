"""Run tasks in a reading process, until its parent ends."""

import ctypes
import gc
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from cogvideox_sat.clips.attempts import Mark, serve_as_reader
from cogvideox_sat.clips.reading_outcomes import Done, Failed, Outcome
from cogvideox_sat.parallel.process_transfer import receive, send
from sgm.errors import UserError

PR_SET_PDEATHSIG = 1  # of Linux: the signal that this process gets when its parent ends
REMEDY = "probably for lack of memory; lower num_workers"


def serve(source: socket.socket, mark: Mark, work: Callable[[Any], Any], threads: int, parent: int) -> None:
    """Run tasks until the parent closes the socket; never return.

    Args:
        source: socket that gives tasks as (number, task) and takes an `Outcome` for each.
        mark: shows the parent which clip is being read.
        threads: threads that decode a clip; 0: as many as there are cores.
        parent: process id of the parent.
    """
    # Garbage of the parent may own threads, for example of process groups, which do not exist here. Destroying it would
    # crash this process.
    gc.freeze()
    # When the trainer is asked to stop, it finishes its step and saves, and needs data until then. So signals to the
    # process group, or to all processes of a job, must not end this process.
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with suppress(AttributeError):  # without Linux, the process ends when it next looks for a task
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    torch.set_num_threads(1)  # the threads of the parent's pool do not exist here, but OpenMP would wait for them
    serve_as_reader(mark, threads)
    while True:
        try:
            number, task = receive(source)
        except EOFError:
            os._exit(0)
        outcome = _outcome(number, task, work)
        mark.clear()
        try:
            send(source, outcome)
        except OSError as error:
            send(
                source, Failed(number, UserError, f"a clip cannot be sent to the trainer ({error.strerror}), {REMEDY}")
            )
        except (pickle.PicklingError, TypeError, AttributeError):  # results of a user's dataset
            send(source, Failed(number, RuntimeError, traceback.format_exc()))


def _outcome(number: int, task: Any, work: Callable[[Any], Any]) -> Outcome:
    try:
        return Done(number, work(task))
    except UserError as error:
        return Failed(number, UserError, str(error))
    except MemoryError as error:
        return Failed(number, UserError, f"a process that reads data has no memory left ({error}), {REMEDY}")
    except Exception as error:
        return Failed(number, type(error), traceback.format_exc())
