"""Read the variables and flags that launchers give a process.

The launchers are torchrun, DeepSpeed, mpirun and srun. Their variables are turned into torchrun's (RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT), which the commands read. Nothing here imports PyTorch.
"""

import argparse
import logging
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgm.errors import UserError

logger = logging.getLogger(__name__)

# Ports below those of Linux's outgoing connections, so that none of these is in use by chance.
FIRST_PORT, PORTS = 20000, 12000
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Launch:
    """One of the processes that a launcher started.

    Attributes:
        launcher: the launcher's name, for messages.
        rank, size: number of this process, and number of processes.
        local_rank, local_size: the same on this machine; None: the launcher does not say.
        job: a text that is the same in all processes of a launch and differs between launches on one machine.
        hosts: the nodes in order, as SLURM writes them; None: the launcher does not say.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None
    job: str
    hosts: str | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Variables
# ---------------------------------------------------------------------------------------------------------------------


def adopt_launcher() -> None:
    """Set torchrun's variables from mpirun's or srun's, if it started several processes.

    Variables of torchrun that are already set are kept.

    Raises:
        UserError: the variables contradict each other, or do not say where the first process is.
    """
    launch = detect_launch(os.environ)
    own_size = _number(os.environ, "WORLD_SIZE")
    if own_size is not None:
        rank = _number(os.environ, "RANK")
        if own_size < 1 or (rank is not None and not 0 <= rank < own_size):
            raise UserError(
                f"RANK is {rank} and WORLD_SIZE {own_size}, but ranks are from 0 to WORLD_SIZE - 1; unset both to run "
                "one process"
            )
        if own_size == 1 and launch and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise UserError(
                f"WORLD_SIZE is 1, but {launch.launcher} started {launch.size} processes, which would all do the same; "
                f"unset RANK and WORLD_SIZE, or start without {launch.launcher}"
            )
        return
    if launch is None:
        return
    if not 0 <= launch.rank < launch.size:
        raise UserError(f"{launch.launcher} says rank {launch.rank} of {launch.size}; start with torchrun instead")
    variables: dict[str, int | str] = {"RANK": launch.rank, "WORLD_SIZE": launch.size}
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    variables["MASTER_ADDR"] = address or first_address(launch)
    variables["MASTER_PORT"] = port or _port(launch.job)
    local_rank = os.environ.get("LOCAL_RANK", launch.local_rank)
    if local_rank is None:
        raise UserError(
            f"{launch.launcher} does not say which processes share a machine; set LOCAL_RANK, or start with torchrun"
        )
    variables["LOCAL_RANK"] = local_rank
    if launch.local_size is not None:
        variables["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", launch.local_size)
    os.environ.update({name: str(value) for name, value in variables.items()})
    if launch.rank == 0:
        logger.info(
            "%s started %d processes; they meet at %s:%s",
            launch.launcher,
            launch.size,
            variables["MASTER_ADDR"],
            variables["MASTER_PORT"],
        )


def is_first_process() -> bool:
    """Return whether this process has rank 0 or is alone, also before `adopt_launcher`."""
    try:
        rank = _number(os.environ, "RANK")
        launch = None if rank is not None else detect_launch(os.environ)
    except UserError:
        return True
    return not (launch.rank if launch else rank)


def check_alone(name: str) -> None:
    """Check that a launcher started only one process of the tool `name`, else raise UserError."""
    launch, size = detect_launch(os.environ), _number(os.environ, "WORLD_SIZE")
    if (size or 1) > 1 or launch:
        raise UserError(f"{name} is one process, but a launcher started several; start it with python alone")


def detect_launch(variables: Mapping[str, str]) -> Launch | None:
    """Return the launch that mpirun's or srun's variables describe; None for a single process.

    srun counts only if it started this step: an sbatch script has SLURM_NTASKS too, but is a single process.
    """
    step_tasks = _number(variables, "SLURM_STEP_NUM_TASKS") or 1
    if (size := _number(variables, "OMPI_COMM_WORLD_SIZE")) is not None:
        job = variables.get("PMIX_NAMESPACE") or variables.get("OMPI_MCA_ess_base_jobid") or ""
        launch = _mpi("mpirun", variables, "OMPI_COMM_WORLD_", size, job)
    elif (size := _number(variables, "MV2_COMM_WORLD_SIZE")) is not None:
        launch = _mpi("mpirun", variables, "MV2_COMM_WORLD_", size, "")
    elif (size := _number(variables, "PMI_SIZE")) is not None and ("MPI_LOCALRANKID" in variables or step_tasks == 1):
        launch = Launch(
            "mpiexec",
            _number(variables, "PMI_RANK") or 0,
            size,
            _number(variables, "MPI_LOCALRANKID"),
            _number(variables, "MPI_LOCALNRANKS"),
            variables.get("PMI_JOBID", ""),
        )
    elif step_tasks > 1:
        launch = Launch(
            "srun",
            _required(variables, "SLURM_PROCID"),
            step_tasks,
            _number(variables, "SLURM_LOCALID"),
            _tasks_of_node(variables.get("SLURM_STEP_TASKS_PER_NODE", ""), _number(variables, "SLURM_NODEID") or 0),
            f"{variables.get('SLURM_JOB_ID', '')}.{variables.get('SLURM_STEP_ID', '')}",
            variables.get("SLURM_STEP_NODELIST"),
        )
    else:
        return None
    return launch if launch.size > 1 else None


def _tasks_of_node(counts: str, node: int) -> int | None:
    """Return the number for a node in SLURM's list, such as `4(x2),3`; None if it is shorter."""
    numbers: list[int] = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        numbers += [int(count)] * int(repeats or 1)
    return numbers[node] if node < len(numbers) else None


def _mpi(launcher: str, variables: Mapping[str, str], prefix: str, size: int, job: str) -> Launch:
    return Launch(
        launcher,
        _required(variables, f"{prefix}RANK"),
        size,
        _number(variables, f"{prefix}LOCAL_RANK"),
        _number(variables, f"{prefix}LOCAL_SIZE"),
        job,
    )


def first_address(launch: Launch) -> str:
    """Return the address of the first process: this machine, or the first of the step's nodes.

    Raises:
        UserError: the launcher does not give it.
    """
    if launch.local_size == launch.size:
        return "127.0.0.1"
    if launch.hosts:
        return first_host(launch.hosts)
    raise UserError(
        f"MASTER_ADDR is not set, and {launch.launcher} does not say where its first process is; set MASTER_ADDR to "
        "the name of that machine in all processes, or start with torchrun"
    )


def first_host(nodes: str) -> str:
    """Return the first name in SLURM's list of nodes: `gpu003` for `gpu[003-007,9],cpu1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None, "it matches the empty text"
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _port(job: str) -> int:
    """Return the port of a launch, which all its processes compute; other launches differ."""
    return FIRST_PORT + zlib.crc32(job.encode()) % PORTS if job.strip(".") else DEFAULT_PORT


def _number(variables: Mapping[str, str], name: str) -> int | None:
    """Return the number in a variable; None if the variable is not set.

    Raises:
        UserError: the variable holds something else.
    """
    value = variables.get(name)
    if value is None or not value.strip():
        return None
    try:
        return int(value)
    except ValueError:
        raise UserError(f"environment variable {name}: got '{value}'; expected a whole number") from None


def _required(variables: Mapping[str, str], name: str) -> int:
    value = _number(variables, name)
    if value is None:
        raise UserError(
            f"the environment variable {name} is not set, but others of its launcher are; start with torchrun"
        )
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


def add_launcher_flags(parser: argparse.ArgumentParser, ignored: Sequence[str] = ()) -> None:
    """Let `parser` accept the flags that launchers and older scripts add to every command.

    Args:
        ignored: names of arguments of SwissArmyTransformer's trainer, which are accepted but not used.
    """
    group = parser.add_argument_group("from launchers and older scripts")
    group.add_argument(
        "--local_rank",
        type=int,
        metavar="N",
        help="number of the process on this machine; LOCAL_RANK in the environment takes precedence",
    )
    group.add_argument(
        "--deepspeed", action="store_true", help="accepted but not needed: training always uses DeepSpeed"
    )
    group.add_argument("--deepspeed_config", metavar="FILE", help="JSON or YAML, merged over the section deepspeed:")
    for name in set(ignored) - {"local_rank"}:
        group.add_argument(f"--{name}", nargs="?", help=argparse.SUPPRESS)


def take_launcher_flags(given: dict[str, Any], ignored: Sequence[str] = ()) -> Path | None:
    """Remove the flags of `add_launcher_flags` from `given`; return `--deepspeed_config`."""
    local_rank = given.pop("local_rank", None)
    if local_rank is not None and local_rank >= 0:  # scripts give -1 for "not distributed"
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    given.pop("deepspeed", None)
    if unused := [name for name in ignored if name in given]:
        logger.info("not used here: %s", ", ".join(f"--{name}" for name in unused))
        for name in unused:
            del given[name]
    path = given.pop("deepspeed_config", None)
    return Path(path) if path is not None else None
