"""Test that mpirun's and srun's variables become torchrun's, and their flags are accepted."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cogvideox_sat.commands import launchers
from cogvideox_sat.commands.launchers import adopt_launcher, detect_launch, first_host, is_first_process
from cogvideox_sat.configuration.training_arguments import get_training_args
from sgm.errors import UserError

ROOT = Path(__file__).parents[2]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "6",
    "OMPI_COMM_WORLD_LOCAL_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "6",
    "PMIX_NAMESPACE": "2875457537",
}
SRUN = {
    **{"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"},
    **{"SLURM_STEP_TASKS_PER_NODE": "4,2", "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_JOB_ID": "7"},
    **{"SLURM_STEP_ID": "0", "SLURM_NTASKS": "6", "SLURM_STEP_NUM_NODES": "2"},
}


@pytest.fixture
def variables(monkeypatch):
    """Return a function that sets variables of a launcher and returns torchrun's afterwards."""
    for name in list(os.environ):
        if name in TORCHRUN or name.startswith(("OMPI_", "SLURM_", "PMI", "MV2_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    for name in TORCHRUN:  # so that monkeypatch restores the variables
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def set_them(**given: str) -> dict[str, str]:
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        adopt_launcher()
        return {name: os.environ[name] for name in TORCHRUN if name in os.environ}

    return set_them


def test_no_launcher(variables):
    assert variables() == {}
    assert is_first_process()


def test_mpirun_on_one_machine(variables):
    adopted = variables(**MPIRUN)
    assert 1024 < int(adopted.pop("MASTER_PORT")) < 32768
    assert adopted == {
        **{"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "6", "MASTER_ADDR": "127.0.0.1"}
    }
    assert not is_first_process()


def test_variables_that_are_set_are_kept(variables):
    given = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node7", "MASTER_PORT": "4242"}
    assert variables(**MPIRUN, **given) == {"RANK": "5", "WORLD_SIZE": "6", **given}


def test_srun_on_several_machines(variables):
    adopted = variables(**SRUN)
    assert 1024 < int(adopted.pop("MASTER_PORT")) < 32768
    assert adopted == {
        **{"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu003"}
    }


def test_all_processes_of_a_launch_meet_at_one_port_and_other_launches_at_another(variables):
    def port(**changed: str) -> int:
        return launchers._port(detect_launch({**SRUN, **changed}).job)

    assert port() == port(SLURM_PROCID="0", SLURM_LOCALID="0") != port(SLURM_STEP_ID="1")


@pytest.mark.parametrize(
    "alone",
    [
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"},  # a script of sbatch
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
        {**MPIRUN, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_a_single_process_stays_alone(variables, alone):
    assert variables(**alone) == {}


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        # mpirun in a step whose tasks are mpirun's daemons
        ({**SRUN, **MPIRUN}, ("mpirun", 5, 6, 5, 6)),
        # srun --mpi=pmi2 also sets PMI's variables, but not the local ranks
        ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "6"}, ("srun", 5, 6, 1, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}, ("mpiexec", 1, 4, 1, 4)),
        (
            {
                f"MV2_COMM_WORLD_{name}": value
                for name, value in zip(("RANK", "SIZE", "LOCAL_RANK"), "140", strict=True)
            },
            ("mpirun", 1, 4, 0, None),
        ),
    ],
)
def test_other_launchers(environment, launch):
    found = detect_launch(environment)
    assert (found.launcher, found.rank, found.size, found.local_rank, found.local_size) == launch


def test_a_launchers_own_variables_win(variables):
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert variables(**torchrun, **SRUN) == torchrun


def test_address_and_port_of_the_user(variables):
    adopted = variables(**{**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, MASTER_ADDR="head", MASTER_PORT="1234")
    assert (adopted["MASTER_ADDR"], adopted["MASTER_PORT"]) == ("head", "1234")


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, "MASTER_ADDR is not set, and mpirun does not say"),
        ({**MPIRUN, "OMPI_COMM_WORLD_RANK": "6"}, "says rank 6 of 6"),
        ({"PMI_RANK": "1", "PMI_SIZE": "4", "MASTER_ADDR": "a"}, "does not say which processes share a machine"),
        ({**MPIRUN, "WORLD_SIZE": "1", "RANK": "0"}, "WORLD_SIZE is 1, but mpirun started 6 processes"),
        ({"WORLD_SIZE": "two"}, "environment variable WORLD_SIZE: got 'two'; expected a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({**SRUN, "SLURM_PROCID": ""}, "SLURM_PROCID is not set"),
    ],
)
def test_what_cannot_be_told_is_one_line(variables, environment, says):
    with pytest.raises(UserError, match=says):
        variables(**environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu003", "gpu003"),
        ("gpu[003-007,9],cpu1", "gpu003"),
        ("a1,a2", "a1"),
        ("r[1-2]n[05,07]-ib", "r1n05-ib"),
        ("node-1.site.org,node-2", "node-1.site.org"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("counts", "node", "tasks"), [("4(x2),3", 1, 4), ("4(x2),3", 2, 3), ("8", 0, 8), ("", 0, None)]
)
def test_tasks_of_a_node(counts, node, tasks):
    assert launchers._tasks_of_node(counts, node) == tasks


def test_a_tool_refuses_to_be_several(variables, caplog):
    from tools.merge_lora import main

    variables(**MPIRUN)
    assert main(["--load", "a", "--lora", "b", "--output", "c"]) == 2
    assert "merge_lora is one process" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def training(tmp_path):
    configs = [ROOT / "configs" / "cogvideox_2b_lora.yaml", ROOT / "configs" / "sft.yaml"]
    return lambda *flags: get_training_args(["--base", *map(str, configs), *map(str, flags)])


@pytest.mark.parametrize("flags", [["--local_rank", "2"], ["--local-rank", "2"], ["--local-rank=2"]])
def test_local_rank(variables, training, flags):
    variables()
    training(*flags)
    assert os.environ["LOCAL_RANK"] == "2"
    training("--local_rank=3")
    assert os.environ["LOCAL_RANK"] == "2"  # as a launcher has set it


def test_local_rank_of_scripts_that_are_not_distributed(variables, training):
    variables()
    training("--local_rank", "-1", "--deepspeed")
    assert "LOCAL_RANK" not in os.environ


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_deepspeed_file_goes_over_the_section(training, tmp_path, suffix):
    path = tmp_path / f"ds.{suffix}"
    content = {"zero_optimization": {"stage": 1}, "optimizer": {"params": {"lr": 1e-5}}, "gradient_clipping": 0.5}
    path.write_text(json.dumps(content) if suffix == "json" else yaml.safe_dump(content))
    section = training("--deepspeed", "--deepspeed_config", path).deepspeed_config
    assert (section["zero_optimization"]["stage"], section["gradient_clipping"]) == (1, 0.5)
    assert section["optimizer"]["params"]["lr"] == 1e-5
    assert section["optimizer"]["type"] == "sat.ops.FusedEmaAdam"  # of configs/sft.yaml
    assert training(f"--deepspeed-config={path}").deepspeed_config == section


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "not valid YAML"), ("[1]", "expected keys and values"), (None, "does not exist"), ("a: [", "line 2")],
)
def test_a_deepspeed_file_that_will_not_do(training, tmp_path, content, says):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"deepspeed_config.*{says}"):
        training("--deepspeed_config", path)


@pytest.mark.parametrize("flag", ["--zero-stage=1", "--lr", "--gradient_accumulation_steps"])
def test_flags_of_what_deepspeeds_section_sets(training, flag):
    with pytest.raises(UserError, match=r"--\w+ is not an argument; set deepspeed\."):
        training(flag)


def test_flags_of_swissarmytransformers_trainer_are_taken_and_said(training, caplog):
    with caplog.at_level(logging.INFO):
        training("--no-load-rng", "--split", "949,50,1", "--distributed-backend=nccl")
    assert "not used here: --no_load_rng, --split, --distributed_backend" in caplog.text


@pytest.mark.slow
def test_the_commands_take_the_flags_without_pytorch(tmp_path):
    """Each command continues to the next mistake, which is one line."""
    flags = ["--local-rank=0", "--deepspeed", "--base", "gone.yaml"]
    for script in ("sat/sample_video.py", "sat/train_video.py", "sat/train_vae.py", "tools/precompute_latents.py"):
        output = ["--output", "x"] if "precompute" in script else []
        command = [sys.executable, str(ROOT / script), *flags, *output]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert f"gone.yaml: No such file or directory, neither in {tmp_path} nor in {ROOT}" in result.stderr


def test_the_line_of_a_launcher_is_said_once(tmp_path):
    """The first process reports the line; the others leave it time to end them."""
    environment = {**os.environ, **MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0"}
    command = [sys.executable, str(ROOT / "sat" / "train_video.py"), "--base", "gone.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, env=environment)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "MASTER_ADDR is not set" in result.stderr


def test_a_single_process_within_a_job_of_slurm_trains_a_vae_alone(monkeypatch):
    """Lightning would take the job's variables for those of a step, and refuse."""
    from types import SimpleNamespace

    import pytorch_lightning as pl

    from cogvideox_sat.configuration.argument_lists import VaeTrainingArguments
    from cogvideox_sat.vae_training.lightning_trainer import Devices, make_trainer

    for name, value in {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NAME": "vae"}.items():
        monkeypatch.setenv(name, value)
    plan = SimpleNamespace(processes=1, ranks_per_clip=1, accumulation=1)
    keeper = pl.Callback()
    keeper.report = None
    keeper.files = pl.plugins.io.TorchCheckpointIO()
    engine = pl.LightningModule()
    trainer = make_trainer(VaeTrainingArguments(), plan, engine, Devices("cpu", 1), keeper)
    assert trainer.world_size == 1
