"""Processes that share the tokens of each clip train like one."""

import shutil
import signal
from pathlib import Path

import pytest
import torch

from cogvideox_sat.configuration.training_arguments import get_training_args
from cogvideox_sat.runs.folders import LOCK_FILE
from cogvideox_sat.training.plan import plan_run
from faulty_processes import ends_of_ranks
from long_cases import long, others_long
from sgm.errors import UserError
from training_clips import write_dataset
from training_runs import assert_same, metrics, precomputed, runs_of, train, train_in_processes, weights, write_config

pytestmark = [pytest.mark.slow]

# A step is the gradient then: Adam's first one would be its sign.
PLAIN = {"type": "torch.optim.SGD", "params": {"lr": 100.0}}  # 1 at the first step


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("clips") / "data", clips=4, frames=12, sizes=[(64, 96)])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "lora", "cached", "size", "processes", "zero"),
    [
        long("5b", False, False, 2, 2, 0),
        long("1.5_i2v", False, False, 2, 4, 2),
        ("2b", True, True, 4, 4, 3),
        long("5b_i2v", True, False, 2, 4, 1),
    ],
)
def test_a_step_is_that_of_one_process(tmp_path, tiny, clips, family, lora, cached, size, processes, zero):
    data = precomputed(tmp_path, tiny, family, clips) if cached else clips
    groups = processes // size
    settings = {"lora": lora, "train_iters": 1, "optimizer": PLAIN}
    settings["deepspeed"] = {"gradient_clipping": 0.0, "train_batch_size": groups}
    one = train(
        write_config(
            tmp_path / "one.yaml", tiny, family, data, micro_batch=groups, save=str(tmp_path / "one"), **settings
        )
    )
    shared = write_config(
        tmp_path / "shared.yaml", tiny, family, data, zero=zero, sequence_parallel_size=size, **settings
    )
    run = train_in_processes(shared, processes)
    assert metrics(run) == pytest.approx(metrics(one), rel=1e-5)
    assert metrics(run, "grad_norm") == pytest.approx(metrics(one, "grad_norm"), rel=1e-4)
    assert_same(weights(run), weights(one), 1e-5)
    at_first = torch.load(next(iter((tiny.folder / family).rglob("*.pt"))))["module"]
    moved = {name: weight - at_first[name] for name, weight in weights(one).items() if name in at_first}
    for name, step in moved.items():  # the gradients
        found = weights(run)[name] - at_first[name]
        assert (found - step).norm() <= 1e-4 * step.norm() + 1e-6, name
    assert lora or any(step.norm() > 0 for step in moved.values())


@pytest.mark.distributed
def test_it_resumes_to_the_bit_and_goes_on_in_one_process(tmp_path, tiny, clips):
    settings = {"micro_batch": 2, "save_interval": 2, "lora": True, "deepspeed": {"train_batch_size": 2}}
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips, sequence_parallel_size=2, **settings)
    run = train_in_processes(config, 2)
    losses, expected = metrics(run), weights(run)
    assert list(losses) == [1, 2, 3, 4]
    shutil.rmtree(run / "4")
    (run / "latest").write_text("2")
    alone = shutil.copytree(run, tmp_path / "alone" / run.name)

    train_in_processes(config, 2, "--resume", str(run))
    assert metrics(run) == losses
    assert_same(weights(run), expected)

    train(config, "--resume", str(alone), "--sequence_parallel_size", "1")
    assert metrics(alone) == pytest.approx(losses, rel=1e-5)
    assert_same(weights(alone), expected, 1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("fault", others_long("killed", "full", "terminated"))
def test_a_process_that_is_lost_ends_the_others(tmp_path, tiny, clips, fault):
    """Only complete checkpoints stay; a signal to stop lets all processes write one."""
    settings = {"lora": True, "save_interval": 1, "sequence_parallel_size": 2, "train_iters": 9}
    config = write_config(tmp_path / "config.yaml", tiny, "2b", clips, **settings)
    (first, said), (second, other) = ends_of_ranks(tmp_path, fault, ["--base", config, "--train_data", clips])
    (run,) = runs_of(config)
    assert "Traceback" not in said + other
    assert second == {"killed": -signal.SIGKILL, "full": 2, "terminated": first}[fault], other
    if fault == "terminated":
        assert first == 0 and weights(run) and (run / "latest").read_text() == "2", said
    else:
        assert first == 2 and "another process has failed" in said
        assert ("the memory of the GPU is full (" in other) == (fault == "full")
        assert weights(run) and (run / "latest").read_text() == "1"
    assert [path.name for path in run.glob(".*")] == [LOCK_FILE]


@pytest.mark.parametrize(
    ("asked", "processes", "says"),
    [
        ({"sequence_parallel_size": 0}, 1, "sequence_parallel_size: got 0; it must be at least 1"),
        ({"sequence_parallel_size": 2}, 3, "sequence_parallel_size: 2 does not divide the 3 processes"),
        ({"sequence_parallel_size": 2, "model_parallel_size": 2}, 4, "choose one of them"),
        ({"sequence_parallel_size": 5}, 5, "5 processes cannot share 4 attention heads"),
    ],
)
def test_numbers_that_do_not_go_together_are_one_line(tmp_path, tiny, clips, monkeypatch, asked, processes, says):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips, **asked)
    with pytest.raises(UserError, match=says):
        plan_run(get_training_args(["--base", str(config)]))
