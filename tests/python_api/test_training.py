"""Fine-tuning as a function is the command's, and leaves a run that can be loaded."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import cogvideox_sat as cv
import processes
from cogvideox_sat.python_api import training
from cogvideox_sat.python_api.training import TrainingRun
from sgm.errors import UserError
from training_clips import write_dataset
from training_runs import assert_same, train, weights, write_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("clips") / "data", clips=4, frames=12, sizes=[(64, 96)])


@pytest.mark.slow
def test_a_run_is_that_of_the_command_and_is_loaded_by_its_folder(tiny, clips, tmp_path):
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips, lora=True)
    (tmp_path / "prompts.txt").write_text("a boat\n")
    watched = {"valid_prompts": tmp_path / "prompts.txt", "eval_interval": 1, "sampling_num_steps": 1}
    run = cv.train(config, train_iters=2, set={"deepspeed.optimizer.params.lr": 0.01}, **watched)
    assert [(video.step, video.prompt, video.path.is_file()) for video in run.videos()] == [
        (step, "a boat", True) for step in (0, 1, 2)
    ]
    assert [line["loss"] for line in run.metrics() if "loss" in line] and [path.name for path in run.checkpoints] == [
        "2"
    ]
    expected = train(config, "--train_iters", "2", "--set", "deepspeed.optimizer.params.lr=0.01")
    assert run.folder != expected
    assert_same(weights(run.folder), weights(expected), 0)
    few = {"size": (32, 48), "frames": 9, "steps": 2}
    with cv.load(run.folder) as pipe:
        assert pipe.lora == {str(run.folder): 1.0}
        adapted = pipe("a boat", **few).latents
        pipe.set_lora({})
        assert not torch.equal(pipe("a boat", **few).latents, adapted)
    assert cv.train(config, train_iters=3, resume=run.folder) == TrainingRun(run.folder)


@pytest.mark.slow
@pytest.mark.distributed
def test_on_two_processes(tiny, clips, tmp_path, capfd, monkeypatch):
    forked = SimpleNamespace(PIPE=subprocess.PIPE, Popen=lambda words, *, text, **to: processes.start(words[1:], **to))
    monkeypatch.setattr(training, "subprocess", forked)
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips, lora=True)
    run = cv.train(config, processes=2, train_iters=1)
    assert [path.name for path in run.checkpoints] == ["1"] and run.folder.parent == tmp_path / "runs"


def test_the_line_that_processes_end_with_is_the_error(tiny, clips, tmp_path, monkeypatch, capfd):
    start = subprocess.Popen
    program = "import sys; sys.stderr.write('a line\\nerror: the data is gone\\nmore\\n'); sys.exit(2)"
    monkeypatch.setattr(subprocess, "Popen", lambda words, **options: start([sys.executable, "-c", program], **options))
    with pytest.raises(UserError, match=r"^the data is gone$"):
        cv.train(write_config(tmp_path / "config.yaml", tiny, "5b", clips), processes=2)
    assert capfd.readouterr().err.endswith("a line\nerror: the data is gone\nmore\n")


def test_mistakes_are_one_line(tiny, clips, tmp_path):
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips)
    for arguments, says in (
        ({"train_itters": 2}, "train_itters: unknown argument; did you mean train_iters?"),
        ({"train_iters": "x"}, "train_iters: got 'x'; expected a whole number"),
        ({"lr": 0.1}, "lr is not an argument; give set={'deepspeed.optimizer.params.lr': …}"),
        ({"config": 5}, "config: got 5; give configuration files"),
        ({"config": []}, "config: got []; give configuration files"),
        ({"set": 5}, "set: got 5; give keys"),
        ({"processes": 0}, "processes: got 0; expected a whole number of at least 1"),
        ({"train_data": "/nowhere"}, "train_data: /nowhere does not exist"),
        ({"set": {"data.parms.fps": 8}}, "data: unknown"),
    ):
        with pytest.raises(UserError) as caught:
            cv.train(arguments.pop("config", config), **arguments)
        assert says in str(caught.value) or "parms" in str(caught.value), caught.value
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()
