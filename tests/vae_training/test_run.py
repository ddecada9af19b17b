"""The VAE training command on a very small one: saving, resuming, several processes."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.runs.step_clock import StepClock
from sgm.util import instantiate_from_config
from train_vae import main
from training_runs import assert_same, metrics, runs_of
from vae_modules.autoencoder import VideoAutoencoderInferenceWrapper
from vae_runs import (
    ROOT,
    SIZE,
    checkpoint,
    finish,
    start,
    train,
    train_in_processes,
    weights,
    write_config,
    write_mixed_dataset,
)
from videos import read_video

NO_ADVERSARY = {"model": {"params": {"loss_config": {"params": {"disc_factor": 0.0}}, "disc_start_iter": 1000}}}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_mixed_dataset(tmp_path_factory.mktemp("clips") / "data")


def losses(run: Path) -> dict[int, dict[str, float]]:
    """Return all logged parts of each step's loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if not any(name.startswith("val") for name in line)]
    return {
        line["step"]: {name: value for name, value in line.items() if name.startswith(("train/", "lr"))}
        for line in steps
    }


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(tmp_path, data):
    """Six steps equal a kill -9 in the fifth or sixth and the rest from step 4.

    They are on images and videos, with the discriminator, each in a process of its own, since earlier computations
    change the last bit of sums.
    """
    settings = {"args": {"save_interval": 2, "train_iters": 6}}
    straight = write_config(tmp_path / "straight.yaml", data, **settings)
    broken = write_config(tmp_path / "broken.yaml", data, args={**settings["args"], "save": str(tmp_path / "broken")})
    whole = start(straight)
    process = start(broken)  # the last one: to start another may take longer than its six steps
    for line in process.stdout:
        if line.startswith("step 5"):
            process.kill()
    assert process.wait() == -signal.SIGKILL
    (run,) = runs_of(broken)
    assert (run / "latest").read_text() == "step=4.ckpt"
    finish(start(broken, "--resume", "latest"))
    finish(whole)
    (expected,) = runs_of(straight)

    assert losses(run) == losses(expected)
    assert {name for values in losses(run).values() for name in values} >= {"train/loss/disc", "train/loss/d_weight"}
    assert_same(weights(run), weights(expected))
    ours, theirs = checkpoint(run), checkpoint(expected)
    assert_same(ours["state_dict"], theirs["state_dict"])
    assert ours["global_step"] == theirs["global_step"] == 6
    assert ours["run"]["data"] == theirs["run"]["data"]


@pytest.mark.slow
def test_another_decoder_of_videos_is_reported_when_a_run_goes_on(tmp_path, data, caplog):
    settings = {"save": str(tmp_path / "runs"), "train_iters": 1}
    run = train(write_config(tmp_path / "a.yaml", data, args=settings, **NO_ADVERSARY))
    assert checkpoint(run)["run"]["reader"]["video_backend"] == "pyav"
    assert yaml.safe_load((run / "training_config.yaml").read_text())["data"]["params"]["video_backend"] == "pyav"
    assert "videos were read with" not in caplog.text

    settings |= {"train_iters": 2}
    by_decord = {"params": {"video_backend": "decord"}}
    train(write_config(tmp_path / "b.yaml", data, args=settings, data=by_decord, **NO_ADVERSARY), "--resume", "latest")
    assert "resume: videos were read with pyav and are now read with decord" in caplog.text


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, data) -> Path:
    """Run four steps at batch 2 on one process, without an adversary."""
    return train(write_config(tmp_path_factory.mktemp("one") / "config.yaml", data, **NO_ADVERSARY))


def assert_same_losses(ours: Path, theirs: Path, rel: float = 1e-4) -> None:
    ours, theirs = losses(ours), losses(theirs)
    assert ours.keys() == theirs.keys()
    for step in theirs:
        assert ours[step] == pytest.approx(theirs[step], rel=rel, abs=1e-6), step


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, data) -> dict[str, Path]:
    """Run two processes on halves of a batch, and on shared clips.

    For the latter input, latents and reconstructions are each process's own.
    """
    folder = tmp_path_factory.mktemp("two")
    shared = {"context_parallel_size": 2, "input_cp": True, "latent_cp": True, "output_cp": True}
    batch = {"batch_size": 1, "save": str(folder / "batch"), "save_interval": 1, "background_checkpoints": True}
    configs = {
        "batch": write_config(folder / "batch.yaml", data, args=batch, **NO_ADVERSARY),
        "clips": write_config(
            folder / "clips.yaml", data, args={"save": str(folder / "clips")}, model={"params": shared}
        ),
    }
    return dict(zip(configs, train_in_processes([*configs.values()], 2), strict=True))


@pytest.mark.distributed
def test_two_processes_equal_one_with_twice_the_batch(two_processes, one_process):
    assert_same_losses(two_processes["batch"], one_process)
    assert_same(weights(two_processes["batch"]), weights(one_process), 1e-4)
    assert len(list((two_processes["batch"] / "checkpoints").iterdir())) == len(losses(one_process)) == 4


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_that_share_clips_equal_one(tmp_path, data, two_processes):
    """Also with images, of which one process has all, and with the discriminator."""
    expected = train(write_config(tmp_path / "config.yaml", data))
    assert_same_losses(two_processes["clips"], expected)
    assert_same(weights(two_processes["clips"]), weights(expected), 1e-4)


@pytest.mark.slow
@pytest.mark.long
def test_two_accumulated_batches_equal_one_of_twice_the_size(tmp_path):
    data = write_mixed_dataset(tmp_path / "data", images=0)
    expected = train(write_config(tmp_path / "one.yaml", data, **NO_ADVERSARY))
    accumulated = {
        "args": {"batch_size": 1, "save": str(tmp_path / "two")},
        "lightning": {"trainer": {"accumulate_grad_batches": 2}},
    }
    run = train(write_config(tmp_path / "two.yaml", data, **accumulated, **NO_ADVERSARY))
    assert_same_losses(run, expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(tmp_path, data, number, monkeypatch):
    config = write_config(tmp_path / "config.yaml", data, args={"train_iters": 10000})
    with monkeypatch.context() as patch:
        step = StepClock.step

        def step_and_signal(clock: StepClock, samples: int) -> None:
            step(clock, samples)
            signals.append(number)
            if len(signals) == 3:
                signal.raise_signal(number)

        signals: list[int] = []
        patch.setattr(StepClock, "step", step_and_signal)
        run = train(config)
    assert (run / "latest").read_text() == "step=3.ckpt"
    assert list(losses(run)) == [1, 2, 3]
    train(config, "--resume", "latest", "--train_iters", "4")
    assert list(losses(run)) == [1, 2, 3, 4]


@pytest.mark.slow
def test_an_evaluation_writes_losses_psnr_and_videos_and_changes_nothing(tmp_path, data, one_process):
    held_out = write_mixed_dataset(tmp_path / "held_out", videos=1, images=0)
    evaluating = {"valid_data": [str(held_out)], "eval_interval": 2, "num_log_videos": 1, "save_interval": 1}
    config = write_config(tmp_path / "config.yaml", data, args=evaluating, **NO_ADVERSARY)
    run = train(config)
    assert losses(run) == losses(one_process)
    for name in ("val/psnr", "val_ema/psnr", "val/loss/total", "val_ema/rec"):
        assert metrics(run, name).keys() == {2, 4}
    _, frames = read_video(run / "reconstructions" / "4" / "0.mp4")
    assert frames.shape == (5, 3, SIZE, 3 * SIZE)

    values = metrics(run, "val_ema/psnr")
    for step in (2, 3):
        train(config, "--resume", str(run / "checkpoints" / f"step={step}.ckpt"))
        assert metrics(run, "val_ema/psnr") == pytest.approx(values)


@pytest.mark.slow
@pytest.mark.long
def test_an_autoencoder_learns(tmp_path):
    """A new one learns a few images in seconds (`image_taps: last`).

    The adversarial phase at the end moves the discriminator and spoils nothing.
    """
    data = write_mixed_dataset(tmp_path / "data", videos=0, images=8)
    settings = {"args": {"train_iters": 80, "batch_size": 4, "log_interval": 10}}
    model = {
        "base_learning_rate": 3e-3,
        "params": {"disc_start_iter": 60, "image_taps": "last", "optimizer_config": {"params": {"eps": 1e-8}}},
    }
    run = train(write_config(tmp_path / "config.yaml", data, model=model, **settings))
    errors, disc = metrics(run, "train/loss/rec"), metrics(run, "train/loss/disc")
    assert errors[60] < errors[10] * 2 / 3
    assert errors[80] < errors[10] * 2 / 3
    assert disc.keys() == {70, 80} and disc[80] < disc[70]
    assert all(0 < weight < 1e4 for step, weight in metrics(run, "train/loss/d_weight").items() if step > 60)


@pytest.mark.slow
def test_the_weights_serve_as_a_first_stage(tmp_path, data, one_process):
    """They have a first stage's names, and equal the averages in the checkpoint."""
    params = yaml.safe_load((one_process / "training_config.yaml").read_text())["model"]["params"]
    parts = {name: params[name] for name in ("encoder_config", "decoder_config", "regularizer_config")}
    vae = VideoAutoencoderInferenceWrapper(**parts, ckpt_path=one_process / "3d-vae.pt")
    assert_same(vae.state_dict(), weights(one_process))
    state = checkpoint(one_process)["state_dict"]
    name = "encoder.conv_in.conv.weight"
    averages = [
        value for key, value in state.items() if key.startswith("model_ema.") and value.shape == state[name].shape
    ]
    assert any(torch.equal(value, vae.state_dict()[name]) for value in averages)
    assert not torch.equal(state[name], vae.state_dict()[name])


@pytest.mark.slow
def test_a_plain_loss_and_a_start_that_fits_in_part(tmp_path, data, caplog):
    """`torch.nn.MSELoss` works, from a file with another last layer; strict refuses it."""
    params = {"loss_config": {"target": "torch.nn.MSELoss", "params": {}}, "ema_decay": None}
    config = write_config(tmp_path / "config.yaml", data, args={"train_iters": 1}, model={"params": params})
    content = yaml.safe_load(config.read_text())
    content["model"]["params"]["loss_config"] = params["loss_config"]
    config.write_text(yaml.safe_dump(content))
    first = train(config)
    assert list(metrics(first, "train/loss/rec")) == [1]
    state = weights(first)
    name = "decoder.conv_out.conv.weight"
    kept = {key: value for key, value in state.items() if key != name}
    torch.save({"state_dict": {**kept, name: torch.zeros(4, *state[name].shape[1:])}}, tmp_path / "other.pt")

    content["model"]["params"] |= {"ckpt_path": str(tmp_path / "other.pt")}
    config.write_text(yaml.safe_dump(content))
    assert main(["--base", str(config)]) == 2
    assert "does not fit VideoAutoencodingEngine" in caplog.text
    content["model"]["params"]["strict"] = False
    config.write_text(yaml.safe_dump(content))
    caplog.clear()
    second = train(config)
    assert f"left out: {name} ((4, 32, 3, 3, 3) instead of (3, 32, 3, 3, 3))" in caplog.text
    assert second != first and weights(second)[name].shape == state[name].shape


@pytest.mark.slow
def test_checkpoints_of_a_future_that_was_given_up_are_deleted(tmp_path, data):
    settings = {"args": {"save_interval": 1, "keep_last": 2}}
    config = write_config(tmp_path / "config.yaml", data, **settings)
    run = train(config)
    assert {file.name for file in (run / "checkpoints").iterdir()} == {"step=3.ckpt", "step=4.ckpt"}
    train(config, "--resume", str(run / "checkpoints" / "step=3.ckpt"), "--keep_last", "1", "--save_interval", "9")
    assert {file.name for file in (run / "checkpoints").iterdir()} == {"step=4.ckpt"}
    assert list(losses(run)) == [1, 2, 3, 4]


# ---------------------------------------------------------------- the configurations that come along


def built(name: str) -> Any:
    """Return the engine of a configuration, without memory for its weights."""
    model = load_configs([ROOT / "configs" / name])["model"]
    model["params"]["loss_config"]["params"]["perceptual_weight"] = 0.0
    model["params"]["ema_decay"] = None
    with torch.device("meta"):
        return instantiate_from_config({"target": model["target"], "params": model["params"]})


def test_the_full_configuration_trains_the_released_autoencoder():
    manifest = json.loads((ROOT / "tests/reference/manifests/vae.json").read_text())
    keys = manifest.get("keys", manifest)
    state = built("vae_3d.yaml").coder_state_dict(ema=False)
    assert {name: list(value.shape) for name, value in state.items()} == keys


def test_the_tiny_configuration_trains_the_first_stage_of_the_tiny_models():
    first_stage = load_configs([ROOT / "configs" / "tiny" / "cogvideox_tiny.yaml"])["model"]["first_stage_config"]
    with torch.device("meta"):
        vae = instantiate_from_config({**first_stage, "params": {**first_stage["params"], "ckpt_path": None}})
    expected = {name: value.shape for name, value in vae.state_dict().items()}
    assert {
        name: value.shape for name, value in built("tiny/vae_images.yaml").coder_state_dict(ema=False).items()
    } == expected


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("run", "step"), -1, "run.step cannot be -1"),
        (("run", "ranks"), [3], "run.ranks cannot be"),
        (("run", "ranks", 0, "random"), {}, "is damaged"),
        (("run", "ranks", 0, "means"), {"train/loss/rec": 3}, "is damaged"),
        (("loops",), {}, "is damaged"),
        (("loops", "fit_loop", "epoch_loop.state_dict", "_batches_that_stepped"), "many", "loops cannot be"),
        (("pytorch-lightning_version",), [], "is damaged"),
        (("optimizer_states", 0, "param_groups"), [], "is damaged"),
        (("optimizer_states", 0, "state", 0), {}, "for some weights only"),
        (("state_dict",), 3, "state_dict cannot be 3"),
    ],
)
@pytest.mark.slow
def test_a_damaged_checkpoint_is_one_line_and_nothing_is_written(small_run, tmp_path, caplog, place, value, says):
    config, whole = small_run
    run = shutil.copytree(whole, tmp_path / "runs" / whole.name)
    content = checkpoint(run)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    torch.save(content, run / "checkpoints" / "step=1.ckpt")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    caplog.clear()
    assert main(["--base", str(config), "--resume", str(run), "--train_iters", "2"]) == 2
    (error,) = (record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    assert says in error and "resume: " in error and "\n" not in error
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for name in ("training_config.yaml", "metrics.jsonl"):
        before.pop(run / name), after.pop(run / name)
    assert before == after


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, data):
    """Return a configuration, and its run with one checkpoint; do not change it."""
    folder = tmp_path_factory.mktemp("small")
    config = write_config(folder / "config.yaml", data, args={"train_iters": 1}, **NO_ADVERSARY)
    return config, train(config)
