"""Mistakes in training are one line and exit code 2, and nothing is lost."""

import errno
import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cogvideox_sat.training import checkpoint_folders
from long_cases import others_long
from support import needs_fp16
from train_video import main
from training_clips import write_dataset
from training_runs import assert_same, metrics, runs_of, train, weights, write_config


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("clips") / "data", clips=4, frames=9)


def failure(caplog, config, *flags: str) -> str:
    """Return the error line of a run."""
    caplog.clear()
    assert main(["--base", str(config), *flags]) == 2
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert "\n" not in errors[0]
    return errors[0]


def test_a_folder_without_videos(tmp_path, tiny, caplog):
    (tmp_path / "data").mkdir()
    message = failure(caplog, write_config(tmp_path / "config.yaml", tiny, "5b", tmp_path / "data"))
    assert str(tmp_path / "data") in message and "video" in message


@pytest.mark.slow
def test_a_missing_label_is_an_empty_caption_or_an_error(tmp_path, tiny, clips, caplog):
    data = shutil.copytree(clips, tmp_path / "data")
    next((data / "labels").iterdir()).unlink()
    config = write_config(tmp_path / "config.yaml", tiny, "5b", data, train_iters=1)
    train(config)
    assert "label" in failure(caplog, config, "--missing_label", "stop")


@pytest.mark.slow
def test_too_many_unreadable_videos_stop_a_run(tmp_path, tiny, clips, caplog):
    data = shutil.copytree(clips, tmp_path / "data")
    for video in sorted((data / "videos").iterdir())[:2]:
        video.write_bytes(b"no video")
    config = write_config(tmp_path / "config.yaml", tiny, "5b", data, train_iters=1)
    assert "unreadable" in failure(caplog, config)
    train(config, "--max_unreadable_share", "0.6")


@pytest.mark.slow
def test_videos_that_are_cut_off_are_replaced_counted_and_listed(tmp_path, tiny, caplog):
    """Their headers are as good as any; that frames are missing shows when they are read."""
    data = write_dataset(tmp_path / "data", clips=4, frames=60)
    broken = sorted((data / "videos").iterdir())[0]
    content = broken.read_bytes()  # the header comes first in these files
    broken.write_bytes(content[: len(content) * 2 // 3])
    config = write_config(tmp_path / "config.yaml", tiny, "5b", data, train_iters=12, max_unreadable_share=0.5)
    run = train(config)
    listed = "".join(file.read_text() for file in run.glob("unreadable*.txt"))
    assert broken.name in listed
    assert metrics(run, "unreadable_clips")[12] == 1
    assert len(metrics(run)) == 12
    config = write_config(tmp_path / "strict.yaml", tiny, "5b", data, train_iters=12)
    assert "unreadable" in failure(caplog, config)


def test_fewer_clips_than_a_batch(tmp_path, tiny, clips, caplog):
    message = failure(caplog, write_config(tmp_path / "config.yaml", tiny, "5b", clips, micro_batch=5))
    assert "5" in message and "4" in message


@pytest.mark.slow
def test_losses_that_are_not_finite_stop_a_run_and_leave_the_weights(tmp_path, tiny, clips, caplog):
    """A very high learning rate spoils the weights in the first step; no later step runs."""
    settings = {"warmup": 0.0, "save_interval": 1, "train_iters": 20, "max_skipped_steps": 3}
    optimizer = {"optimizer": {"params": {"lr": 1e38}}}
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips, deepspeed=optimizer, **settings)
    message = failure(caplog, config)
    assert "3 steps in a row" in message
    assert any("step 4 is left out: the loss is not finite" in record.getMessage() for record in caplog.records)
    (run,) = runs_of(config)
    assert metrics(run, "skipped_steps") == {1: 0, 2: 1, 3: 2}
    first = torch.load(run / "1" / "mp_rank_00_model_states.pt")["module"]
    assert_same({k: v.nan_to_num() for k, v in weights(run).items()}, {k: v.nan_to_num() for k, v in first.items()})


@needs_fp16
def test_fp16_losses_that_are_not_finite_stop_a_run_too(tmp_path, tiny, clips, caplog):
    """DeepSpeed would give up by itself when the loss scale is at its minimum."""
    optimizer = {"optimizer": {"params": {"lr": 1e38}}, "fp16": {"enabled": True, "initial_scale_power": 1}}
    config = write_config(
        tmp_path / "config.yaml",
        tiny,
        "5b",
        clips,
        deepspeed=optimizer,
        warmup=0.0,
        train_iters=50,
        max_skipped_steps=8,
    )
    assert "8 steps in a row" in failure(caplog, config)


@pytest.mark.slow
def test_an_optimizer_whose_state_cannot_be_saved_is_refused_at_once(tmp_path, tiny, clips, caplog):
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips)
    content = yaml.safe_load(config.read_text())
    content["deepspeed"]["optimizer"] = {"type": "torch.optim.Adafactor", "params": {"lr": 0.01}}
    config.write_text(yaml.safe_dump(content))
    assert "Adafactor cannot be saved" in failure(caplog, config)


def test_a_failed_start_leaves_no_folder(tmp_path, tiny, clips, caplog):
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips, micro_batch=5)
    failure(caplog, config)
    assert runs_of(config) == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", others_long("during", "before", "behind the steps"))
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, tiny, clips, caplog, monkeypatch, moment):
    behind = moment == "behind the steps"
    config = write_config(
        tmp_path / "config.yaml", tiny, "5b", clips, save_interval=2, background_checkpoints=behind, train_iters=7
    )
    with monkeypatch.context() as patch:
        saves = []
        if moment == "before":
            usage = shutil.disk_usage(tmp_path)

            def free_for_one(path):
                saves.append(path)
                return usage._replace(free=usage.free if len(saves) == 1 else 1000)

            patch.setattr(checkpoint_folders.shutil, "disk_usage", free_for_one)
        else:
            write = torch.save

            def fail_at_the_second(content, path):
                saves.append(path)
                if len(saves) > 2:  # weights and averages of the first
                    path.write_bytes(b"half")
                    raise OSError(errno.ENOSPC, "No space left on device")
                write(content, path)

            patch.setattr(checkpoint_folders.torch, "save", fail_at_the_second)
        message = failure(caplog, config)
    assert "disk is full" in message and "MiB are needed" in message
    (run,) = runs_of(config)
    assert (run / "latest").read_text() == "2"
    assert not list(run.glob(".*.part"))
    assert max(metrics(run)) < 7
    train(config, "--resume", "latest", "--train_iters", "4")
    assert max(metrics(run)) == 4


@pytest.mark.slow
def test_a_checkpoint_of_another_model_names_the_first_mismatch(tmp_path, tiny, clips, caplog):
    run = train(write_config(tmp_path / "config.yaml", tiny, "5b", clips, lora=True, train_iters=1))
    ranks = {"network_config": {"params": {"modules": {"lora_config": {"params": {"r": 8}}}}}}
    other = write_config(tmp_path / "other.yaml", tiny, "5b", clips, lora=True, model=ranks)
    message = failure(caplog, other, "--resume", str(run))
    assert "matrix_A" in message and "(4, 256)" in message and "(8, 256)" in message
    full = train(write_config(tmp_path / "full.yaml", tiny, "2b", clips, train_iters=1, save=str(tmp_path / "full")))
    message = failure(caplog, write_config(tmp_path / "1.5.yaml", tiny, "1.5", clips), "--resume", str(full))
    assert "mixins." in message and str(full) in message


@pytest.mark.slow
def test_another_optimizer_is_named(tmp_path, tiny, clips, caplog):
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips, lora=True, train_iters=1)
    run = train(config)
    content = yaml.safe_load(config.read_text())
    content["deepspeed"]["optimizer"] = {"type": "torch.optim.SGD", "params": {"lr": 0.1, "momentum": 0.9}}
    config.write_text(yaml.safe_dump(content))
    message = failure(caplog, config, "--resume", str(run), "--train_iters", "2")
    assert "EmaAdam" in message and "SGD" in message


@pytest.mark.slow
@pytest.mark.parametrize("damage", others_long("half a state", "no optimizer", "another network split"))
def test_a_training_state_that_does_not_do(tmp_path, tiny, clips, caplog, damage):
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips, lora=True, train_iters=1)
    run = train(config)
    state = run / "1" / "training_state" / "state.json"
    content = json.loads(state.read_text())
    if damage == "no optimizer":
        for file in state.parent.glob("*.safetensors"):
            file.unlink()
        says = "has no exp_avg of"
    elif damage == "another network split":
        content["optimizer"]["model_parallel_size"] = 2
        says = "model_parallel_size 2, not 1, and does not hold the optimizer's tensors of all ranks"
    else:
        del content["data"]
        says = "has no complete training state"
    state.write_text(json.dumps(content))
    assert says in failure(caplog, config, "--resume", str(run), "--train_iters", "2")


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory, tiny, clips):
    """Return a configuration, and its run with one checkpoint; do not change it."""
    config = write_config(
        tmp_path_factory.mktemp("adapter") / "config.yaml", tiny, "5b", clips, lora=True, train_iters=1
    )
    return config, train(config)


def _in_state(change):
    def damage(run):
        file = run / "1" / "training_state" / "state.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return damage


def _in_tensors(change):
    def damage(run):
        (file,) = (run / "1" / "training_state").glob("*.safetensors")
        save_file({name: change(tensor) for name, tensor in load_file(file).items()}, file)

    return damage


def _in_weights(change):
    def damage(run):
        file = run / "1" / "mp_rank_00_model_states.pt"
        content = torch.load(file, weights_only=True)
        content["module"] = change(content["module"])
        torch.save(content, file)

    return damage


DAMAGES = {
    "latest is no text": (lambda run: (run / "latest").write_bytes(b"\xff"), "latest is not text"),
    "latest is elsewhere": (lambda run: (run / "latest").write_text("../x"), "not the name of a checkpoint"),
    "nested state": (
        lambda run: (run / "1" / "training_state" / "state.json").write_text("[" * 100000),
        "no complete training state",
    ),
    "negative step": (_in_state(lambda state: state.update(step=-1)), "step cannot be -1"),
    "another step": (_in_state(lambda state: state.update(step=7)), "the training state of step 7"),
    "no kinds": (_in_state(lambda state: state["optimizer"].update(kinds=[])), "does not list exp_avg"),
    "no count of steps": (_in_state(lambda state: state["optimizer"].update(state={})), "state.json is damaged"),
    "a rate too many": (_in_state(lambda state: state["optimizer"]["rates"].append(1)), "learning rates of"),
    "a schedule of another kind": (_in_state(lambda state: state.update(schedule={})), "state.json is damaged"),
    "generators": (_in_state(lambda state: state["random"][0].update(torch="AAAA")), "state.json is damaged"),
    "shapes": (_in_tensors(lambda tensor: tensor[:1].clone()), "does not fit its shape"),
    "types": (_in_tensors(torch.Tensor.bool), "bool"),
    "moments": (_in_tensors(lambda tensor: tensor * math.nan), "not finite"),
    "numbered weights": (_in_weights(lambda module: dict(enumerate(module.values()))), "not a name of a weight"),
    "complex weights": (
        _in_weights(lambda module: {name: tensor.to(torch.complex64) for name, tensor in module.items()}),
        "complex numbers",
    ),
    "weights without values": (
        _in_weights(lambda module: {name: tensor.to("meta") for name, tensor in module.items()}),
        "without values",
    ),
    "a record that is nested": (
        lambda run: (run / "clip_timeouts-0000.jsonl").write_text("[" * 100000 + "\n{}\n"),
        "line 1: not valid",
    ),
    "a record of other types": (
        lambda run: (run / "clip_timeouts-0000.jsonl").write_text(
            '{"data": [], "step": [], "epoch": 0, "sample": 0, "clip": "a", "reason": "b", "substitute": null}\n\n'
        ),
        "line 1: not valid",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.slow
def test_a_damaged_run_is_one_line_and_stays_as_it_is(tmp_path, adapter_run, caplog, damage):
    config, whole = adapter_run
    run = shutil.copytree(whole, tmp_path / "runs" / whole.name)
    change, says = DAMAGES[damage]
    change(run)
    before = {path: path.read_bytes() for path in run.glob("1*/**/*") if path.is_file()}
    assert says in failure(caplog, config, "--resume", str(run), "--train_iters", "2")
    assert {path: path.read_bytes() for path in before} == before
    assert not (run / "2").exists()


def test_damaged_notes_of_a_run_do_not_stop_it(tmp_path, adapter_run):
    """Such files are only appended to, or only compared."""
    config, whole = adapter_run
    run = shutil.copytree(whole, tmp_path / "runs" / whole.name)
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    (run / "unreadable-0000.txt").write_bytes(b"\xff\x00\n")
    (run / "metrics.jsonl").write_bytes(b"[" * 100000 + b'\n{"step": ' + b"9" * 4000 + b"}\n\xff\n")
    (run / "training_config.yaml").unlink()
    (run / "training_config.yaml").symlink_to(victim)
    train(config, "--resume", str(run), "--train_iters", "2", "--max_unreadable_share", "0.6")
    assert list(metrics(run)) == [2]
    assert victim.read_text() == "as it was"


def test_resuming_from_weights_alone(tmp_path, tiny, clips, caplog):
    config = write_config(tmp_path / "config.yaml", tiny, "5b", clips)
    assert "load" in failure(caplog, config, "--resume", str(tiny.folder / "5b"))
