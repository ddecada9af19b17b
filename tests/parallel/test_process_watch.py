"""Waiting processes name their reason; a silent process ends the others with one line."""

import subprocess
import time

import pytest

import processes
from cogvideox_sat.parallel import process_watch
from cogvideox_sat.parallel.process_watch import Phase, Reading
from distributed import environments_of_ranks, killed_at_the_end, own_imports

# One of two processes, for which a scenario is given; the first prints what it logs, and is judged by its exit code.
PROGRAM = """
import logging, os, signal, sys, time
from cogvideox_sat.parallel import process_watch
from cogvideox_sat.parallel import agreement
process_watch.FIRST_LINE, process_watch.INTERVAL, process_watch.LEAST_SILENCE = 1.0, 0.1, 2.0
from cogvideox_sat.parallel.process_watch import Reading
logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stdout)
rank, scenario, limit = int(os.environ["RANK"]), sys.argv[1], 2.0
agreement.join_processes(limit)
with agreement.limited_collectives(limit):
    agreement.meet("the beginning")
    if scenario == "reads long":
        if rank == 1:
            detail = lambda: [Reading(time.monotonic() - 50, 0, "clips/a.mp4")]
            with process_watch.phase("reading the clips of step 3", detail):
                time.sleep(4)
        print("met", agreement.meet("the clips of step 3", rank))
        sys.exit(0)
    process_watch.begin("step 7", limited=True)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if scenario == "frozen in a step":
        agreement.any_process(False)
    elif scenario == "frozen between steps":
        agreement.meet("the checkpoint")
"""


def run_two(scenario: str) -> tuple[int, str]:
    """Return the exit code and the output of the first process."""
    ranks = [
        processes.start(["-c", PROGRAM, scenario], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for environment in environments_of_ranks(2)
    ]
    with killed_at_the_end(ranks):
        output, _ = ranks[0].communicate(timeout=90)
        return ranks[0].returncode, output


@pytest.mark.distributed
@pytest.mark.slow
def test_a_process_that_waits_says_for_which_and_what_that_does():
    code, output = run_two("reads long")
    assert code == 0, output
    lines = output.splitlines()
    assert lines[-1] == "met 1"
    assert lines[0].startswith("rank 0 has waited ")
    assert "for the clips of step 3: rank 1 is reading the clips of step 3: clips/a.mp4 since 5" in lines[0]
    assert len(lines) <= 4  # again after twice as long


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "says"),
    [
        ("frozen in a step", "error: collective_timeout: rank 0 waited 2 s for another process, at step 7; continue"),
        ("frozen between steps", "for the checkpoint, and rank 1 gave no sign of life for 2 s; continue with --resume"),
    ],
)
def test_a_process_that_does_not_answer_ends_the_others_with_one_line(scenario, says):
    began = time.monotonic()
    code, output = run_two(scenario)
    assert code == 2, output
    assert says in output
    assert "Traceback" not in output
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_step_that_nccl_would_end_without_a_word_ends_with_a_line():
    program = """
import logging, sys, time
from cogvideox_sat.parallel import process_watch
from cogvideox_sat.parallel import agreement
process_watch.INTERVAL = 0.1
logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stdout)
agreement.join_processes()
with process_watch.watching(1.0, ends_slow_steps=True):
    watch = next(thread for thread in __import__("threading").enumerate() if thread.name == "process watch")
    watch.size, watch.others = 2, lambda: {1: {"silent": 9.0}}
    with process_watch.phase("loading"):
        time.sleep(1.5)
    process_watch.begin("step 4", limited=True)
    time.sleep(30)
"""
    done = processes.run(["-c", program], env=own_imports(), timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("error: collective_timeout: step 4 has taken more than 1 s on rank 0")


def test_a_phase_names_the_clip_that_is_read_longest():
    now = time.monotonic()
    readings = [Reading(now - 5, 0, "new.mp4"), Reading(now - 70, 0, "old.mp4")]
    assert Phase("reading", now, detail=lambda: readings).describe() == "reading: old.mp4 since 70 s"
    assert Phase("saving", now).describe() == "saving"
    process_watch.begin("loading")
    with process_watch.phase("saving"):
        assert process_watch.current_text() == "saving"
    assert process_watch.current_text() == "loading"
