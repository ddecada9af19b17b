"""Test that `--deterministic` sets PyTorch's flags during a training run, and is recorded."""

import os

import pytest
import torch
import yaml

import sample_video
import vae_runs
from cogvideox_sat.configuration.determinism import (
    WORKSPACE,
    check_workspace,
    describe_change,
    deterministic_arithmetic,
)
from cogvideox_sat.configuration.vae_training_arguments import get_vae_training_args
from cogvideox_sat.sampling import session as sampling_session
from cogvideox_sat.training import run as training_run
from cogvideox_sat.vae_training import run as vae_training_run
from sgm.errors import UserError
from training_clips import write_dataset
from training_runs import assert_same, metrics, train, weights, write_config

PLAIN = {"algorithms": False, "warn only": False, "cudnn": False, "benchmark": False, "workspace": None}
STRICT = {**PLAIN, "algorithms": True, "cudnn": True, "workspace": ":4096:8"}


def flags() -> dict[str, object]:
    """Return the present flags of PyTorch and cuBLAS."""
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        "workspace": os.environ.get(WORKSPACE),
    }


@pytest.fixture(autouse=True)
def plain_flags(monkeypatch):
    """Reset flags that other tests may have left on."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    assert flags() == PLAIN


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("clips"), clips=2, frames=9, sizes=[(64, 96)])


@pytest.fixture(scope="module")
def vae_clips(tmp_path_factory):
    return vae_runs.write_mixed_dataset(tmp_path_factory.mktemp("vae_clips"), videos=2, images=2)


@pytest.fixture
def seen(monkeypatch) -> list[dict[str, object]]:
    """Record the flags within each step of the network's training and each batch of the VAE's."""
    found = []
    step, batches = training_run.Trainer.train_step, vae_training_run.own_frames
    monkeypatch.setattr(training_run.Trainer, "train_step", lambda self: (found.append(flags()), step(self)))
    monkeypatch.setattr(vae_training_run, "own_frames", lambda *args: (found.append(flags()), batches(*args))[1])
    return found


@pytest.mark.slow
@pytest.mark.long
def test_a_run_computes_in_a_fixed_order_only_when_asked(tmp_path, tiny, clips, seen, one_thread, caplog):
    config = write_config(tmp_path / "config.yaml", tiny, "2b", clips, train_iters=2, save_interval=1)
    plain = train(config)
    assert seen == [PLAIN] * 2
    strict = train(config, "--deterministic", "--experiment_name", "strict")
    assert seen[2:] == [STRICT] * 2
    assert flags() == PLAIN
    # On a CPU the order of sums is always the same.
    assert metrics(plain) == metrics(strict)
    assert_same(weights(plain), weights(strict))
    recorded = [yaml.safe_load((run / "training_config.yaml").read_text())["args"] for run in (plain, strict)]
    assert [args["deterministic"] for args in recorded] == [False, True]

    caplog.clear()
    train(config, "--resume", str(strict / "1"), "--deterministic")
    assert "was trained with" not in caplog.text
    train(config, "--resume", str(strict / "1"))
    assert f"{strict} was trained with --deterministic and is resumed with --no-deterministic" in caplog.text
    assert seen[4:] == [STRICT, PLAIN]


@pytest.mark.slow
@pytest.mark.long
def test_a_vae_is_trained_in_a_fixed_order_only_when_asked(tmp_path, vae_clips, seen, one_thread, caplog):
    def config(name: str, **trainer: object):
        args = {"train_iters": 3, "save_interval": 2, "experiment_name": name}
        return vae_runs.write_config(tmp_path / f"{name}.yaml", vae_clips, args=args, lightning={"trainer": trainer})

    plain = vae_runs.train(config("plain"))
    assert seen and all(each == PLAIN for each in seen)
    seen.clear()
    strict = vae_runs.train(config("strict"), "--deterministic")
    assert seen and all(each == STRICT for each in seen)
    assert flags() == PLAIN
    assert_same(vae_runs.weights(plain), vae_runs.weights(strict))
    seen.clear()
    in_lightning = vae_runs.train(config("lightning", deterministic=True, benchmark=False))
    assert seen and all(each == STRICT for each in seen)
    assert flags() == PLAIN
    runs = (plain, strict, in_lightning)
    recorded = [yaml.safe_load((run / "training_config.yaml").read_text())["args"]["deterministic"] for run in runs]
    assert recorded == [False, True, True]

    caplog.clear()
    vae_runs.train(config("plain"), "--resume", str(plain / "checkpoints" / "step=2.ckpt"), "--deterministic")
    assert f"{plain} was trained with --no-deterministic and is resumed with --deterministic" in caplog.text


def test_sampling_asks_only_cudnn_for_a_fixed_order(tiny, tmp_path, monkeypatch):
    found = []

    def build_engine(*_):
        found.append(flags())
        raise UserError("seen")

    monkeypatch.setattr(sampling_session, "build_engine", build_engine)
    (tmp_path / "prompts.txt").write_text("a boat\n")
    files = ["--input_file", str(tmp_path / "prompts.txt"), "--output_dir", str(tmp_path / "videos")]
    size = ["--sampling_num_frames", "1", "--sampling_image_size", "32", "48"]
    assert sample_video.main(["--base", str(tiny.config("5b")), *files, *size, "--device", "cpu"]) == 2
    assert found == [{**PLAIN, "cudnn": True}]


@pytest.mark.parametrize(
    ("trainer", "says"),
    [({"deterministic": "always"}, "deterministic: got 'always'"), ({"benchmark": True}, "benchmark is on")],
)
def test_lightning_is_not_asked_for_the_contrary(tmp_path, trainer, says):
    config = vae_runs.write_config(tmp_path / "config.yaml", tmp_path, lightning={"trainer": trainer})
    with pytest.raises(UserError, match=says):
        get_vae_training_args(["--base", str(config), "--deterministic"])


def test_the_command_line_turns_off_what_a_file_turns_on(tmp_path):
    trainer = {"deterministic": True, "benchmark": True}
    config = vae_runs.write_config(tmp_path / "config.yaml", tmp_path, lightning={"trainer": trainer})
    assert not get_vae_training_args(["--base", str(config), "--no-deterministic"]).deterministic


def test_an_operation_without_a_fixed_order_is_a_line():
    tensor = torch.zeros(4)
    says = "deterministic: the operation put_ has no deterministic form"
    with pytest.raises(UserError, match=says), deterministic_arithmetic(True):
        tensor.put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert flags() == PLAIN
    with pytest.raises(RuntimeError, match="planted"), deterministic_arithmetic(True):
        raise RuntimeError("planted")
    assert flags() == PLAIN


def test_a_workspace_of_cublas_that_sums_in_any_order_is_refused(monkeypatch):
    for value, fits in ((":4096:8", True), (":16:8", True), (":4096:2:16:8", False), ("", False)):
        monkeypatch.setenv(WORKSPACE, value)
        check_workspace(False)
        if fits:
            check_workspace(True)
            with deterministic_arithmetic(True):
                assert os.environ[WORKSPACE] == value
            assert os.environ[WORKSPACE] == value
        else:
            with pytest.raises(UserError, match=f"{WORKSPACE}={value}, "):
                check_workspace(True)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "args: 3", "args: {deterministic: true", "a: " + "[" * 2000 + "]" * 2000),
        "{args: {deterministic: true}}",
    ],
    ids=("empty", "list", "number", "cut off", "deep", "true"),
)
def test_what_a_run_has_recorded(tmp_path, content):
    """Only the last record says what the run was trained with."""
    (tmp_path / "training_config.yaml").write_text(content)
    assert (describe_change(tmp_path, False) is not None) == content.endswith("}}")
    assert describe_change(tmp_path / "none", True) is None
