"""Test the arguments of training: command line, then files, then defaults.

Files for sampling, released models and SwissArmyTransformer's trainer are accepted unchanged. Mistakes are one line
that names the place.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from arguments import get_args
from cogvideox_sat.configuration.argument_fields import argument_fields
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.training_arguments import TrainingArguments, build_parser, get_training_args
from cogvideox_sat.training.plan import check_clips
from sgm.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
MODELS = sorted(path.stem for path in CONFIGS.glob("cogvideox*.yaml"))
TINY_MODELS = sorted(path.stem for path in CONFIGS.glob("tiny/cogvideox*.yaml"))
MODEL = str(CONFIGS / "cogvideox_5b_lora.yaml")
SFT = str(CONFIGS / "sft.yaml")


@pytest.fixture
def args_of(tmp_path):
    """Return the arguments of CogVideoX-5B's LoRA, configs/sft.yaml and the given sections."""

    def args_of(*command_line: str, **sections: dict) -> TrainingArguments:
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text(yaml.safe_dump(sections))
        return get_training_args(["--base", MODEL, SFT, str(overlay), *command_line])

    return args_of


def test_command_line_over_files_over_defaults(args_of):
    args = args_of("--train_iters", "7", "--train_data", "a", "b", args={"train_iters": 5, "eval_iters": 3})
    assert (args.train_iters, args.train_data, args.eval_iters) == (7, ["a", "b"], 3)
    assert (args.mode, args.save, args.lr_decay_style, args.resume) == ("finetune", "ckpts", "linear", None)
    assert args.checkpoint_activations is None
    assert args_of("--no-checkpoint_activations").checkpoint_activations is False
    assert args.data_config["params"]["max_num_frames"] == 49
    assert args.deepspeed_config["optimizer"]["params"]["betas"] == [0.9, 0.95]


@pytest.mark.parametrize("name", argument_fields(TrainingArguments))
def test_every_argument_is_a_flag_with_help(name):
    (action,) = [action for action in build_parser()._actions if f"--{name}" in action.option_strings]
    assert len(action.help) > 10


# ---------------------------------------------------------------------------------------------------------------------
# Files for several commands
# ---------------------------------------------------------------------------------------------------------------------


def test_files_of_sampling_and_training_go_together(args_of, caplog):
    args = args_of(args={"input_file": "prompts.txt", "offload": "none", "batch_size": 3})
    assert not caplog.text
    assert args.sampling_fps == 8


def test_what_a_run_saves_serves_both_commands(args_of, tmp_path):
    args = args_of("--seed", "5", "--fp16", args={"sampling_image_size": [96, 144], "train_data": "clips"})
    assert args.train_data == ["clips"]
    (tmp_path / "training_config.yaml").write_text(yaml.safe_dump(args.merged_config))
    command = ["--base", str(tmp_path / "training_config.yaml")]
    assert vars(get_training_args(command)) == vars(args)
    sampling = get_args([*command, "--input_file", "prompts.txt"])
    assert (sampling.seed, sampling.sampling_image_size, sampling.fp16, sampling.bf16) == (5, [96, 144], True, False)


# Arguments for SwissArmyTransformer's trainer.
WILD_ARGS = {
    **{"checkpoint_activations": True, "model_parallel_size": 1, "experiment_name": "lora-disney", "mode": "finetune"},
    **{"load": "transformer", "no_load_rng": True, "train_iters": 1000, "eval_iters": 1, "eval_interval": 100},
    **{"eval_batch_size": 1, "save": "ckpts_2b_lora", "save_interval": 100, "log_interval": 20, "split": "1,0,0"},
    **{"train_data": ["disney"], "valid_data": ["disney"], "num_workers": 8, "force_train": True},
    **{"only_log_video_latents": True},
}
WILD_DEEPSPEED = """
train_micro_batch_size_per_gpu: 2
gradient_accumulation_steps: 1
steps_per_print: 50
gradient_clipping: 0.1
zero_optimization:
  stage: 2
  cpu_offload: false
  contiguous_gradients: false
  overlap_comm: true
  reduce_scatter: true
  reduce_bucket_size: 1000000000
  allgather_bucket_size: 1000000000
  load_from_fp32_weights: false
zero_allow_untested_optimizer: true
bf16:
  enabled: False
fp16:
  enabled: True
  loss_scale: 0
  loss_scale_window: 400
  hysteresis: 2
  min_loss_scale: 1
optimizer:
  type: sat.ops.FusedEmaAdam
  params:
    lr: 0.001
    betas: [0.9, 0.95]
    eps: 1e-8
    weight_decay: 1e-4
activation_checkpointing:
  partition_activations: false
  contiguous_memory_optimization: false
wall_clock_breakdown: false
"""


def test_a_file_of_the_earlier_trainer_serves(tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "wild.yaml"
    data = {"target": "data_video.SFTDataset", "params": {"video_size": [480, 720], "fps": 8, "max_num_frames": 49}}
    sections = {"args": WILD_ARGS, "data": data, "deepspeed": yaml.safe_load(WILD_DEEPSPEED)}
    path.write_text(yaml.safe_dump(sections))
    args = get_training_args(["--base", str(CONFIGS / "cogvideox_2b_lora.yaml"), str(path)])
    assert (args.experiment_name, args.valid_data, args.force_train) == ("lora-disney", ["disney"], True)
    assert (args.fp16, args.bf16, args.checkpoint_activations) == (True, False, True)
    assert args.deepspeed_config["optimizer"]["params"]["eps"] == 1e-8
    assert "not used here: no_load_rng, split" in caplog.text


@pytest.mark.parametrize("model", MODELS)
def test_every_model_goes_with_the_shipped_files(model):
    sft = "sft_1.5.yaml" if "1.5" in model else "sft.yaml"
    base = [str(CONFIGS / name) for name in (f"{model}.yaml", sft, "sft_full.yaml")]
    args = get_training_args(["--base", *base])
    assert (args.fp16, args.bf16) == ("_2b" in model, "_2b" not in model)
    assert args.deepspeed_config["optimizer"]["params"]["lr"] == 1e-5
    check_clips(args.data_config["params"], ModelLimits.from_config(args.model_config))


@pytest.mark.parametrize("model", TINY_MODELS)
def test_every_tiny_model_goes_with_the_tiny_file(model):
    args = get_training_args(["--base", *(str(CONFIGS / "tiny" / f"{name}.yaml") for name in (model, "sft"))])
    assert (args.fp16, args.bf16) == (False, False)
    assert set(args.train_data) == {"data/spirals_latents", "data/known_shapes_latents"}
    assert ("lora_config" in args.model_config["network_config"]["params"]["modules"]) == model.endswith("_lora")
    check_clips(args.data_config["params"], ModelLimits.from_config(args.model_config))


# ---------------------------------------------------------------------------------------------------------------------
# Precision
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "deepspeed", "expected"),
    [
        ((), {}, "bf16"),
        ((), {"fp16": {"enabled": True}}, "fp16"),
        ((), {"fp16": {"enabled": True}, "bf16": {"enabled": False}}, "fp16"),
        ((), {"bf16": {"enabled": False}}, "bf16"),
        (("--bf16",), {"fp16": {"enabled": True}}, "bf16"),
        (("--fp16",), {}, "fp16"),
        (("--no-bf16",), {}, None),
        (("--no-fp16",), {"fp16": {"enabled": True}}, None),
    ],
)
def test_flags_over_the_deepspeed_section_over_the_models_file(args_of, flags, deepspeed, expected):
    """The file of the 5B model says bf16. The result is the same in both places."""
    args = args_of(*flags, deepspeed=deepspeed)
    for name in ("fp16", "bf16"):
        assert getattr(args, name) == (name == expected)
        assert args.deepspeed_config[name]["enabled"] == (name == expected)


@pytest.mark.parametrize(
    ("flags", "sections"),
    [
        (("--fp16", "--bf16"), {}),
        ((), {"args": {"fp16": True, "bf16": True}}),
        ((), {"deepspeed": {"fp16": {"enabled": True}, "bf16": {"enabled": True}}}),
    ],
)
def test_both_precisions_in_one_place_are_a_mistake(args_of, flags, sections):
    with pytest.raises(UserError, match=r"fp16 and bf16 are both (on|enabled); choose one"):
        args_of(*flags, **sections)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("train_itres", 5, "args: unknown key 'train_itres'; did you mean train_iters?"),
        ("sampling_image_sise", [1, 2], "unknown key 'sampling_image_sise'"),
        ("lr", 1e-4, "args: lr is not read; set deepspeed.optimizer.params.lr instead"),
        ("zero_stage", 2, "is not read; set deepspeed.zero_optimization.stage instead"),
        ("split", "95,5,0", "split: got 95,5,0; training data is not split; name validation data as valid_data"),
        ("train_data", [1], "train_data: got [1]; expected texts"),
        ("train_iters", "many", "train_iters: got 'many'; expected a whole number"),
        ("train_iters", 0, "train_iters: got 0; it must be at least 1"),
        ("keep_last", 0, "keep_last: got 0; it must be at least 1"),
        ("eval_interval", 0, "eval_interval: got 0; it must be at least 1"),
        ("num_workers", -1, "num_workers: got -1; it must be at least 0"),
        ("warmup", 100, "warmup: got 100.0; expected a share, from 0 to 1"),
        ("max_unreadable_share", 10, "expected a share, from 0 to 1"),
        ("clip_timeout", 0, "clip_timeout: 0.0 is not a duration; give a number of seconds above 0"),
        ("collective_timeout", float("inf"), "collective_timeout: inf is not a duration"),
        ("lr_decay_ratio", 0, "lr_decay_ratio: got 0.0; expected a share, above 0"),
        ("lr_decay_style", "exponential", "lr_decay_style: got 'exponential'; it can be constant, linear, cosine"),
        ("missing_label", "skip", "missing_label: got 'skip'; it can be empty, stop"),
        ("experiment_name", "a/b", "experiment_name: got 'a/b'; expected the name of a folder, without"),
        ("experiment_name", "", "experiment_name: got ''"),
        ("load", None, "load: missing; name the checkpoint to start from, or give --force_train"),
        ("device", "gpu", "device: got 'gpu'; it can be cpu, cuda or cuda:N"),
        ("seed", -1, "seed: got -1; expected a whole number from 0 to 2^63 - 1"),
    ],
)
def test_mistakes_in_args(args_of, key, value, says):
    with pytest.raises(UserError) as error:
        args_of(args={key: value})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_splits_that_keep_all_for_training_say_nothing(args_of, caplog):
    plain = args_of()
    for split in ("1,0,0", "100, 0.0, 0", 1):
        args = args_of(args={"split": split})
        assert (args.train_data, args.valid_data) == (plain.train_data, plain.valid_data)
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    with pytest.raises(UserError, match="split: got 100, 0"):
        args_of(args={"split": "100, 0.1, 0"})


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["cogvideox_2b.yaml"], "data.target: missing; name configs/sft.yaml too"),
        (["sft.yaml"], "model.network_config: missing; name a model's file too"),
        ([], "--base: missing"),
    ],
)
def test_missing_files_are_asked_for(files, says):
    base = ["--base", *(str(CONFIGS / name) for name in files)] if files else []
    with pytest.raises(UserError, match=says):
        get_training_args(base)


def test_unknown_flags_and_model_keys_name_the_nearest(args_of, caplog):
    with pytest.raises(UserError, match="unknown argument --train_iter; did you mean --train_iters"):
        args_of("--train_iter", "5")
    args_of(model={"noised_image_inputs": True})
    assert "model.noised_image_inputs is not used; did you mean noised_image_input?" in caplog.text


def test_mistakes_of_the_command_end_with_one_line_before_pytorch_is_imported():
    code = "import sys, train_video\ncode = train_video.main(sys.argv[1:])\nassert 'torch' not in sys.modules\n"
    code += "sys.exit(code)"
    environment = {"PYTHONPATH": str(ROOT / "sat"), "PATH": ""}
    tiny = [str(CONFIGS / "tiny" / name) for name in ("cogvideox_tiny.yaml", "sft.yaml")]
    for arguments, says in (
        (["--base", "gone.yaml"], "configuration gone.yaml: No such file"),
        (["--base", *tiny, "--train_data", "gone"], "train_data: gone does not exist"),
    ):
        command = [sys.executable, "-c", code, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, timeout=60)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
        assert result.stderr.startswith(f"error: {says}")
