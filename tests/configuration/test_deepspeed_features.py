"""Test that values only DeepSpeed reads are checked early, and its errors get a key."""

import pytest

from cogvideox_sat.configuration import deepspeed_features
from cogvideox_sat.configuration.deepspeed import check_deepspeed_config
from cogvideox_sat.configuration.deepspeed_features import check_features, complaint
from sgm.errors import UserError


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pipeline", [1]),
        ("aio", 5),
        ("comms_logger", "x"),
        ("flops_profiler", {"enabled": "perhaps"}),
        ("flops_profiler", {"enabled": True, "profile_step": "x"}),
        ("torch_autocast", {"enabled": "maybe"}),
        ("torch_autocast", {"enabled": True, "dtype": "evil"}),
        ("torch_autocast", {"lower_precision_safe_modules": [5]}),
        ("data_types", {"grad_accum_dtype": "os.system"}),
        ("communication_data_type", "evil"),
        ("seq_parallel_communication_data_type", 7),
        ("checkpoint", {"tag_validation": "x"}),
        ("gradient_allreduce_op", "x"),
        ("gradient_predivide_factor", 0),
        ("gradient_predivide_factor", "x"),
        ("log_level", {}),
        ("activation_checkpointing", {"number_checkpoints": "x"}),
    ],
)
def test_values_that_deepspeed_would_stop_at(key, value):
    section = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}, key: value}
    with pytest.raises(UserError, match=rf"^deepspeed: {key}\b"):
        check_deepspeed_config(section)


@pytest.mark.parametrize(("key", "value"), [("betas", [0.9, 0.9, 0.9]), ("adam_w_mode", "x"), ("bias_correction", [])])
def test_parameters_of_optimizers_that_are_known(key, value):
    optimizer = {"type": "sat.ops.FusedEmaAdam", "params": {"lr": 1e-3, key: value}}
    with pytest.raises(UserError, match=rf"^deepspeed: optimizer\.params\.{key}\b"):
        check_deepspeed_config({"train_micro_batch_size_per_gpu": 1, "optimizer": optimizer})


def test_a_feature_whose_package_is_missing(monkeypatch):
    monkeypatch.setattr(deepspeed_features.importlib.util, "find_spec", lambda name: None)
    check_features({"comet": {"enabled": False}})
    with pytest.raises(UserError, match="comet needs the package comet_ml"):
        check_features({"comet": {"enabled": True}})


def test_what_fits_passes():
    check_features(
        {
            "communication_data_type": "FP32",
            "data_types": {"grad_accum_dtype": "bf16"},
            "torch_autocast": {"enabled": True, "dtype": "torch.bfloat16", "lower_precision_safe_modules": ["a.B"]},
            "checkpoint": {"tag_validation": "Warn"},
            "gradient_predivide_factor": 2,
            "flops_profiler": {"enabled": False},
        }
    )


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("'os.system' is not valid", "deepspeed.data_types.grad_accum_dtype: 'os.system' is not valid"),
        ("topk_ratio\n  is no number", "deepspeed.zero_optimization.zenflow.topk_ratio: topk_ratio is no number"),
        ("", "deepspeed: ValueError"),
    ],
)
def test_a_complaint_has_the_key_that_it_is_about(message, line):
    section = {"data_types": {"grad_accum_dtype": "os.system"}, "zero_optimization": {"zenflow": {"topk_ratio": "x"}}}
    assert complaint(ValueError(message), section) == line
