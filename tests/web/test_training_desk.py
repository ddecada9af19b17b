"""Inputs become a training command made only of what the page was started with."""

import json
import sys
import time
from pathlib import Path

import pytest

from cogvideox_sat.web import training_desk
from cogvideox_sat.web.run_views import is_run
from cogvideox_sat.web.shelves import Shelf
from cogvideox_sat.web.training_desk import TrainingDesk, is_data
from sgm.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
RECIPES = {"tiny": [str(CONFIGS / "cogvideox_tiny_lora.yaml"), str(CONFIGS / "sft.yaml")]}


@pytest.fixture
def desk(tmp_path):
    for name in ("data/clips", "data/held_out", "runs", "outside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data" / "link").symlink_to(tmp_path / "outside")
    data = Shelf(tmp_path / "data", "train_data", is_data)
    desk = TrainingDesk(RECIPES, data, Shelf(tmp_path / "runs", "run", is_run))
    yield desk
    desk.close()


GIVEN = {"recipe": "tiny", "train_data": "clips"}


def test_what_is_filled_in_becomes_a_command(desk, tmp_path):
    plan = desk.plan({
        **GIVEN, "valid_data": "held_out", "name": "spirals-2", "train_iters": "12", "batch_size": "2",
        "learning_rate": "1e-3", "save_interval": "6", "eval_interval": 4, "seed": "",
    })  # fmt: skip
    assert plan.words() == [
        "--base", *RECIPES["tiny"], "--train_data", str(tmp_path / "data" / "clips"), "--save", str(tmp_path / "runs"),
        "--experiment_name", "spirals-2", "--log_interval", "1", "--no-only_log_video_latents", "--train_iters", "12",
        "--save_interval", "6", "--eval_interval", "4", "--valid_data", str(tmp_path / "data" / "held_out"),
        "--set", "deepspeed.train_micro_batch_size_per_gpu=2", "deepspeed.optimizer.params.lr=0.001",
    ]  # fmt: skip


def test_prompts_for_evaluation_name_no_files(desk):
    prompts = "a kite@@/etc/passwd\n\n a boat "
    plan = desk.plan({**GIVEN, "prompts": prompts, "eval_interval": 2})
    lines = Path(plan.arguments["valid_prompts"]).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"prompt": "a kite@@/etc/passwd"}, {"prompt": "a boat"}]
    assert plan.arguments["eval_interval"] == 2
    desk.close()
    assert not desk.folder.exists()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"recipe": None}, "recipe: got None; it can be tiny"),
        ({"recipe": "/etc/x.yaml"}, "recipe: got '/etc/x.yaml'; it can be tiny"),
        ({"train_data": ""}, "train_data: nothing is chosen; choose a data set"),
        ({"train_data": "../outside"}, "train_data: '../outside' does not exist; choose one of the list"),
        ({"train_data": "link"}, "train_data: 'link' does not exist; choose one of the list"),
        ({"valid_data": "/etc"}, "train_data: '/etc' does not exist"),
        ({"name": "../../etc/x"}, "name: got '../../etc/x'; expected up to 40 letters, digits, - and _"),
        ({"name": "--save"}, "name: got '--save'; expected up to 40"),
        ({"name": "a" * 41}, "name: got 'aaaaaaa"),
        ({"train_iters": "0"}, "train_iters: got '0'; expected a whole number from 1 to 10000000"),
        ({"batch_size": "1 model.x=2"}, "batch_size: got '1 model.x=2'; expected a whole number"),
        ({"prompts": "p\n" * 9}, "prompts: 9 prompts; 8 are the most"),
        ({"learning_rate": "fast"}, "learning_rate: got 'fast'; expected a number from 0 to 1"),
    ],
)
def test_mistakes_are_one_line_and_start_nothing(desk, given, line):
    with pytest.raises(UserError) as error:
        desk.start({**GIVEN, **given})
    assert str(error.value).startswith(line)
    assert desk.program is None


def test_what_the_command_would_refuse_is_told_at_once(desk, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("args: {train_itres: 5}")
    desk.recipes = {"tiny": [*RECIPES["tiny"], str(broken)]}
    with pytest.raises(UserError, match="train_itres"):
        desk.start(GIVEN)
    assert desk.program is None


def test_without_a_folder_for_runs_nothing_is_started(desk):
    with pytest.raises(UserError, match="runs: the page has no folder for runs; start it with --runs DIR"):
        desk.runs = Shelf(None, "run")
        desk.plan(GIVEN)


def test_one_run_at_a_time_that_is_stopped(desk, monkeypatch, tmp_path):
    program = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); print('up', flush=True); time.sleep(60)"
    )
    monkeypatch.setattr(training_desk, "training_words", lambda processes: [sys.executable, "-c", program])
    (tmp_path / "runs" / "page-01-01-01-01").mkdir()
    (tmp_path / "runs" / "page-01-01-01-01" / "metrics.jsonl").touch()
    desk.start(GIVEN)
    assert desk.is_running()
    assert desk.own_run() is None, "an older run is none of its own"
    with pytest.raises(UserError, match="training: page is running; stop it, or wait until it has ended"):
        desk.start(GIVEN)
    (tmp_path / "runs" / "page-01-01-01-02").mkdir()
    (tmp_path / "runs" / "page-01-01-01-02" / "metrics.jsonl").touch()
    assert desk.own_run() == "page-01-01-01-02"
    while not desk.program.log():
        time.sleep(0.01)
    assert desk.stop()
    assert desk.program.wait(30) == 0
    assert not desk.stop()
    desk.start(GIVEN)
    desk.close()
    assert not desk.is_running()
