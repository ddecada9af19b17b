"""Test that mistakes before VAE training are one line and exit code 2, and write nothing."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cogvideox_sat.configuration.argument_fields import argument_fields
from cogvideox_sat.configuration.argument_lists import VaeTrainingArguments
from cogvideox_sat.configuration.vae_training_arguments import build_parser, get_vae_training_args
from cogvideox_sat.vae_training.plan import plan_vae_run
from sgm.errors import UserError
from train_vae import main
from training_runs import runs_of
from vae_runs import ROOT, train, write_config, write_mixed_dataset

FULL, TINY = ROOT / "configs" / "vae_3d.yaml", ROOT / "configs" / "tiny" / "vae_images.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_mixed_dataset(tmp_path_factory.mktemp("clips") / "data")


@pytest.fixture
def failure(tmp_path, data, caplog):
    """Return the command's line for a changed configuration; check that no run folder exists."""

    def failure(*flags: str, **changes: Any) -> str:
        caplog.clear()
        config = write_config(tmp_path / "config.yaml", data, **changes)
        before = runs_of(config)
        assert main(["--base", str(config), *flags]) == 2
        assert runs_of(config) == before
        (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert "\n" not in line
        return line

    return failure


@pytest.mark.parametrize("name", argument_fields(VaeTrainingArguments))
def test_every_argument_is_a_flag_with_help(name):
    (action,) = [action for action in build_parser()._actions if f"--{name}" in action.option_strings]
    assert len(action.help) > 10


@pytest.mark.parametrize("path", [FULL, TINY])
def test_the_files_that_come_along_can_be_trained(path, data, tmp_path):
    """The configuration that a run saves says the same."""
    flags = ["--train_data", str(data), "--valid_data", str(data), "--save", str(tmp_path)]
    args = get_vae_training_args(["--base", str(path), *flags, "--seed", "5"])
    plan = plan_vae_run(args)
    assert (plan.processes, plan.ranks_per_clip, plan.accumulation, plan.resume) == (1, 1, 1, None)
    saved = tmp_path / "training_config.yaml"
    saved.write_text(yaml.safe_dump(args.merged_config))
    assert vars(get_vae_training_args(["--base", str(saved)])) == vars(args)


def params(**changes: Any) -> dict[str, Any]:
    return {"model": {"params": changes}}


def trainer(**changes: Any) -> dict[str, Any]:
    return {"lightning": {"trainer": changes}}


def clips(**changes: Any) -> dict[str, Any]:
    return {"data": {"params": changes}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"args": {"train_itres": 5}}, "args: unknown key 'train_itres'; did you mean train_iters?"),
        ({"args": {"batch_size": 0}}, "batch_size: got 0; it must be at least 1"),
        ({"args": {"device": "gpu"}}, "device: got 'gpu'"),
        ({"args": {"train_data": []}}, "train_data: missing"),
        ({"args": {"train_data": ["gone"]}}, "train_data: gone does not exist"),
        ({"args": {"valid_data": ["gone"]}}, "valid_data: gone does not exist"),
        ({"args": {"resume": "gone"}}, "resume: gone does not exist"),
        ({"model": {"base_learning_rate": 0}}, "model.base_learning_rate: got 0; expected a positive number"),
        ({"model": {"target": "vae_modules.autoencoder.Engine"}}, "vae_modules.autoencoder.Engine"),
        (trainer(precison=16), "lightning.trainer: unknown key 'precison'; did you mean precision?"),
        (trainer(max_steps=5), "lightning.trainer: max_steps is not read; set args.train_iters instead"),
        (trainer(accumulate_grad_batches=0), "accumulate_grad_batches: got 0; expected a whole number from 1"),
        (trainer(gradient_clip_val=-1.0), "gradient_clip_val: got -1.0; expected a positive number"),
        (trainer(devices=2), "start them with `torchrun --standalone --nproc_per_node=2 sat/train_vae.py"),
        (trainer(strategy="fsdp"), "strategy: got 'fsdp'; it can be auto or ddp"),
        (trainer(precision="7-bit"), "lightning.trainer: "),
        ({"lightning": {"callbacks": {}}}, "lightning: unknown key 'callbacks'"),
        (clips(max_num_frames=10), "max_num_frames: got 10; clips are cut to 4k+1 frames, for example 9"),
        (clips(video_size=[20, 16]), "height 20 does not fit; this autoencoder takes multiples of 8, for example 16"),
        (clips(video_size="big"), "video_size: got 'big'; expected [height, width]"),
        (params(context_parallel_size=2), "context_parallel_size: 2 does not divide the 1 process of"),
        (params(ckpt_path="gone.pt"), "ckpt_path: gone.pt does not exist"),
        (params(trainable_ae_params=[["decoder.conv_last"]]), "decoder.conv_last"),
        (params(encoder_config={"params": {"chanels": 3}}), "chanels"),
        (params(encoder_config={"params": {"ch_mult": [1, 2]}}), "decoder_config.params.ch_mult: the decoder enlarges"),
        (params(decoder_config={"params": {"temporal_compress_times": 2}}), "the encoder reduces clips 4 times"),
        (params(loss_config={"params": {"perceptual_weight": 1.0, "lpips_weights": "gone.pth"}}), "gone.pth"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(failure, changes, says):
    assert says in failure(**changes)


@pytest.mark.parametrize(
    ("processes", "size", "frames", "says"),
    [
        (4, 3, 17, "context_parallel_size: 3 does not divide the 4 processes"),
        (4, 4, 9, "context_parallel_size is 4, but a clip has 3 latent frames to share"),
    ],
)
def test_processes_that_cannot_share_clips(tmp_path, data, monkeypatch, processes, size, frames, says):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    changes = params(context_parallel_size=size) | clips(max_num_frames=frames)
    config = write_config(tmp_path / "config.yaml", data, **changes)
    with pytest.raises(UserError, match=says):
        plan_vae_run(get_vae_training_args(["--base", str(config)]))


def test_processes_that_share_clips_get_the_same_batches(tmp_path, data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = write_config(tmp_path / "config.yaml", data, **params(context_parallel_size=2))
    plan = plan_vae_run(get_vae_training_args(["--base", str(config)]))
    assert (plan.ranks_per_clip, plan.data_ranks) == (2, 2)


@pytest.mark.slow
def test_a_folder_without_labels_is_fine(tmp_path, data, caplog):
    train(write_config(tmp_path / "config.yaml", data, args={"train_iters": 1}))
    assert "caption" not in caplog.text and "label" not in caplog.text


@pytest.mark.slow
def test_weights_and_checkpoints_of_another_architecture(tmp_path, data, failure):
    """The error names the first difference and the file."""
    wide = {"params": {"z_channels": 8}}
    other = params(encoder_config=wide, decoder_config=wide)
    save = {"args": {"train_iters": 1, "save": str(tmp_path / "other")}}
    run = train(write_config(tmp_path / "other.yaml", data, **other, **save))
    weights = str(run / "3d-vae.pt")
    message = failure(**params(ckpt_path=weights))
    assert weights in message and "conv_out" in message
    message = failure("--resume", str(run))
    assert "is of another model" in message and str(run) in message and "conv_out" in message
    message = failure("--resume", weights)
    assert "is not a checkpoint; name the folder of a run or its checkpoints/step=N.ckpt" in message
    (run / "checkpoints" / "step=1.ckpt").write_bytes(b"no checkpoint")
    assert "step=1.ckpt" in failure("--resume", str(run))


def test_resuming_what_is_complete(tmp_path, data, failure):
    config = write_config(tmp_path / "config.yaml", data, args={"train_iters": 1})
    run = train(config)
    assert main(["--base", str(config), "--resume", "latest"]) == 0
    assert runs_of(config) == [run]
    message = failure("--resume", str(run), "--train_iters", "1")
    assert "is at step 1 of 1; raise train_iters to continue" in message


def test_losses_that_are_not_finite_end_a_run_and_leave_its_checkpoint(tmp_path, data, caplog):
    config = write_config(tmp_path / "config.yaml", data, args={"save_interval": 1}, model={"base_learning_rate": 1e30})
    assert main(["--base", str(config)]) == 2
    assert "is not finite at step" in caplog.text
    (run,) = runs_of(config)
    assert (run / "latest").read_text() == "step=1.ckpt"


@pytest.mark.slow
def test_mistakes_of_the_command_end_with_one_line_before_pytorch_is_imported():
    code = "import sys, train_vae\ncode = train_vae.main(sys.argv[1:])\nassert 'torch' not in sys.modules\n"
    code += "sys.exit(code)"
    environment = {"PYTHONPATH": str(ROOT / "sat"), "PATH": ""}
    for arguments, says in (
        (["--base", "gone.yaml"], "configuration gone.yaml: No such file"),
        (["--base", str(TINY), "--train_data", "gone"], "train_data: gone does not exist"),
        (["--base", str(TINY), "--batch_sise", "2"], "unknown argument --batch_sise; did you mean --batch_size"),
    ):
        command = [sys.executable, "-c", code, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, timeout=60)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
        assert result.stderr.startswith(f"error: {says}")
