"""Arguments come from the command line, then the last file that has them, then defaults."""

from pathlib import Path

import pytest
import yaml

from arguments import SamplingArguments, build_parser, get_args
from cogvideox_sat.configuration.argument_fields import argument_fields
from sgm.errors import UserError

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "configs" / "cogvideox_5b.yaml")
PROMPTS = ("--input_file", "prompts.txt")


def args_of(*command_line: str, overlay: dict | None = None, folder: Path | None = None) -> SamplingArguments:
    base = [MODEL]
    if overlay is not None:
        (folder / "overlay.yaml").write_text(yaml.safe_dump({"args": overlay}))
        base.append(str(folder / "overlay.yaml"))
    return get_args(["--base", *base, *PROMPTS, *command_line])


def test_command_line_over_files_over_defaults(tmp_path):
    overlay = {"sampling_fps": 12, "output_dir": "elsewhere"}
    args = args_of("--sampling_fps", "24", overlay=overlay, folder=tmp_path)
    assert (args.sampling_fps, args.output_dir, args.sampling_num_frames) == (24, "elsewhere", 13)
    assert (args.seed, args.batch_size, args.offload, args.sampling_num_steps) == (1234, 1, "stage", None)
    assert args.model_config["network_config"]["params"]["hidden_size"] == 3072


def test_values_on_the_command_line():
    args = args_of("--sampling_image_size", "256", "320", "--force_inference", "--lora_scale", "0.5", "--device=cuda:1")
    assert (args.sampling_image_size, args.force_inference, args.lora_scale) == ([256, 320], True, 0.5)
    assert args.device == "cuda:1"


def test_a_later_file_replaces_the_dtype_of_an_earlier_one(tmp_path):
    args = args_of(overlay={"fp16": True}, folder=tmp_path)
    assert (args.bf16, args.fp16) == (False, True)


def test_a_key_of_the_model_that_nothing_reads_is_named(tmp_path, caplog):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"scale_facter": 0.5}}))
    get_args(["--base", MODEL, str(overlay), *PROMPTS])
    assert "model.scale_facter is not used; did you mean scale_factor?" in caplog.text


def test_a_flag_replaces_the_dtype_of_the_file():
    assert (args_of().bf16, args_of().fp16) == (True, False)
    args = args_of("--fp16")
    assert (args.bf16, args.fp16) == (False, True)
    args = args_of("--no-bf16")
    assert (args.bf16, args.fp16) == (False, False)


def test_a_flag_replaces_what_the_file_does_with_existing_outputs(tmp_path):
    args = args_of("--skip_existing", overlay={"overwrite": True}, folder=tmp_path)
    assert (args.overwrite, args.skip_existing) == (False, True)


def test_values_of_files_are_taken_as_they_are_meant(tmp_path):
    overlay = {"batch_size": [2], "lora_scale": 1, "sampling_num_steps": None, "sampling_fps": None, "seed": 2**63 - 1}
    args = args_of(overlay=overlay, folder=tmp_path)
    assert (args.batch_size, args.lora_scale, args.sampling_num_steps, args.sampling_fps) == (2, 1.0, None, 8)
    assert (type(args.lora_scale), args.seed) == (float, 2**63 - 1)


def test_keys_of_training_may_stand_in_the_same_file(tmp_path):
    """Keys of training, also older ones, may be in the same file; training's files sample."""
    overlay = {"mode": "finetune", "train_iters": 8, "train_data": ["clips"], "no_load_rng": True, "sampling_fps": 12}
    args = args_of(overlay=overlay, folder=tmp_path)
    assert (args.mode, args.sampling_fps) == ("finetune", 12)
    with pytest.raises(UserError, match=r"unknown key 'train_itres'; did you mean train_iters\?"):
        args_of(overlay={"train_itres": 8}, folder=tmp_path)


def test_numbers_without_a_point_are_numbers(tmp_path):
    """YAML takes `1e-1` for text."""
    assert args_of(overlay={"lora_scale": "1e-1"}, folder=tmp_path).lora_scale == 0.1
    with pytest.raises(UserError, match="lora_scale: got 'strong'; expected a number"):
        args_of(overlay={"lora_scale": "strong"}, folder=tmp_path)


def test_defaults_are_not_shared():
    first, second = (SamplingArguments(load="x") for _ in range(2))
    first.sampling_image_size.append(1)
    assert second.sampling_image_size == [480, 720]


@pytest.mark.parametrize("name", argument_fields(SamplingArguments))
def test_every_argument_is_a_flag_with_help(name):
    (action,) = [action for action in build_parser()._actions if f"--{name}" in action.option_strings]
    assert len(action.help) > 10


def test_abbreviations_are_unknown_arguments():
    """Else a new argument could change what an old command means."""
    with pytest.raises(UserError, match="unknown argument --sampling_fp; did you mean --sampling_fps"):
        args_of("--sampling_fp", "8")
