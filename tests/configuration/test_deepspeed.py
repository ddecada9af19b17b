"""Test that DeepSpeed's section is accepted in all spellings, and mistakes are errors.

DeepSpeed itself would ignore them, or stop after the model is loaded.
"""

import copy
from pathlib import Path

import pytest

from cogvideox_sat.configuration import deepspeed_values
from cogvideox_sat.configuration.deepspeed import check_deepspeed_config
from cogvideox_sat.configuration.files import load_configs
from sgm.errors import UserError

ROOT = Path(__file__).parents[2]
ADAM = {"type": "Adam", "params": {"lr": 1e-3}}


def checked(**changes) -> dict:
    return check_deepspeed_config({"train_micro_batch_size_per_gpu": 1, "optimizer": copy.deepcopy(ADAM), **changes})


# ---------------------------------------------------------------------------------------------------------------------
# Accepted sections
# ---------------------------------------------------------------------------------------------------------------------


def test_the_shipped_section_is_taken_as_it_is():
    section = load_configs([ROOT / "configs" / "sft.yaml"])["deepspeed"]
    assert check_deepspeed_config(section) == section


@pytest.mark.parametrize(
    ("written", "understood"),
    [
        ({"zero_optimization": {"stage": 2, "cpu_offload": False}}, {"zero_optimization": {"stage": 2}}),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True}},
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        ),
        (
            {"zero_optimization": {"stage": 3, "cpu_offload_param": True, "cpu_offload_use_pin_memory": False}},
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": False}}},
        ),
        ({"zero_optimization": True}, {"zero_optimization": {"stage": 1}}),
        ({"bfloat16": {"enabled": True}}, {"bf16": {"enabled": True}}),
        ({"gradient_clipping": "1e-1"}, {"gradient_clipping": 0.1}),
        (
            {"zero_optimization": {"reduce_bucket_size": "5e8"}},
            {"zero_optimization": {"reduce_bucket_size": 500000000}},
        ),
        ({"amp": {"enabled": False}, "sparse_gradients": False}, {}),
        ({"fp16": None}, {}),
    ],
)
def test_older_spellings(written, understood):
    assert checked(**written) == {**checked(), **understood}


def test_loss_scaling_beside_fp16_means_that_of_fp16():
    """Released files have these keys beside `fp16`; keys in `fp16` take precedence."""
    fp16 = {"enabled": True, "hysteresis": 1}
    section = {"train_micro_batch_size_per_gpu": 1, "optimizer": ADAM, "fp16": fp16, "loss_scale": 0, "hysteresis": 2}
    config = check_deepspeed_config(section)
    assert config["fp16"] == {"enabled": True, "hysteresis": 1, "loss_scale": 0}
    assert "loss_scale" not in config


@pytest.mark.parametrize("name", ["Adam", "adamw", "Lion", "SGD", "torch.optim.SGD", "sat.ops.FusedEmaAdam"])
def test_optimizers_of_deepspeed_of_torch_and_by_import_path(name):
    assert checked(optimizer={"type": name, "params": {"lr": 0.1}})["optimizer"]["type"] == name


@pytest.mark.parametrize("name", ["WarmupDecayLR", "StepLR"])
def test_schedulers(name):
    assert checked(scheduler={"type": name, "params": {}})["scheduler"]["type"] == name


def test_keys_without_their_prefix():
    checked(zero_optimization={"stage": 3, "max_live_parameters": 1})


def test_keys_of_another_version(monkeypatch):
    monkeypatch.setattr(
        deepspeed_values, "installed_keys", {"": {"time_travel"}, "zero_optimization": {"warp"}}.__getitem__
    )
    assert checked(time_travel=True)["time_travel"]
    assert checked(zero_optimization={"warp": True})["zero_optimization"]["warp"]
    with pytest.raises(UserError, match="unknown key 'warp'"):
        checked(warp=True)
    monkeypatch.setattr(deepspeed_values, "installed_keys", lambda place: {"stage"})
    with pytest.raises(UserError, match="unknown key 'stage'"):  # a key of another part
        checked(stage=2)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


def optimizer(**params) -> dict:
    return {"optimizer": {"type": "sat.ops.FusedEmaAdam", "params": {"lr": 1e-3, **params}}}


def zero(**changes) -> dict:
    return {"zero_optimization": {"stage": 2, **changes}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"zero_optimisation": {}}, "deepspeed: unknown key 'zero_optimisation'; did you mean zero_optimization?"),
        ({"stage": 2}, "deepspeed: unknown key 'stage'"),
        ({"xyzzy": 1}, "deepspeed: unknown key 'xyzzy'"),
        (zero(stages=2), "deepspeed.zero_optimization: unknown key 'stages'; did you mean stage?"),
        (zero(offload_optimizer={"devise": "cpu"}), "zero_optimization.offload_optimizer: unknown key 'devise'"),
        ({"fp16": {"enable": True}}, "deepspeed.fp16: unknown key 'enable'; did you mean enabled?"),
        ({"bf16": {"loss_scale": 1}}, "deepspeed.bf16: unknown key 'loss_scale'"),
        ({"activation_checkpointing": {"profil": True}}, "activation_checkpointing: unknown key 'profil'"),
        ({"optimizer": {**ADAM, "lr": 1}}, "deepspeed.optimizer: unknown key 'lr'"),
        (optimizer(learning_rate=1), "deepspeed.optimizer.params: unknown key 'learning_rate'"),
        ({"scheduler": {"name": "WarmupLR"}}, "deepspeed.scheduler: unknown key 'name'"),
        ({"amp": {"enabled": True}}, "amp is a feature that DeepSpeed has removed"),
        (zero(stage=4), "zero_optimization.stage: got 4; it can be 0, 1, 2 or 3"),
        (zero(stage="two"), "zero_optimization.stage: got 'two'"),
        ({"zero_optimization": 2}, "zero_optimization: got 2; expected keys and values"),
        (zero(stage=0, cpu_offload=True), "offload_optimizer needs stage 1, 2 or 3; zero_optimization.stage is 0"),
        (zero(offload_param={"device": "cpu"}), "offload_param needs stage 3; zero_optimization.stage is 2"),
        (zero(offload_optimizer={"device": "disk"}), "device: got 'disk'; it can be none, cpu or nvme"),
        (zero(offload_optimizer={"device": "nvme"}), "nvme_path: got None; expected an existing folder"),
        (
            {"train_micro_batch_size_per_gpu": 0},
            "train_micro_batch_size_per_gpu: got 0; expected a whole number, at least 1",
        ),
        ({"train_micro_batch_size_per_gpu": "auto"}, "train_micro_batch_size_per_gpu: got 'auto'"),
        ({"train_micro_batch_size_per_gpu": None}, "train_micro_batch_size_per_gpu: missing"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps: got 1.5; expected a whole number"),
        ({"gradient_clipping": -1}, "gradient_clipping: got -1; expected a number, at least 0"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16 and bf16 are both enabled; choose one"),
        ({"fp16": {"enabled": "auto"}}, "fp16.enabled: got 'auto'; expected true or false"),
        ({"fp16": {"loss_scale_window": 0}}, "fp16.loss_scale_window: got 0; expected a whole number, at least 1"),
        ({"fp16": True}, "fp16: got True; expected keys and values"),
        ({"optimizer": None}, "optimizer: missing; give its type, such as sat.ops.FusedEmaAdam"),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer.type: got None; expected a name"),
        ({"optimizer": {"type": "Adam"}}, "optimizer.params: got None; expected keys and values"),
        ({"optimizer": {"type": "Adam", "params": {}}}, "optimizer.params.lr: missing"),
        ({"optimizer": {"type": "RMSProp", "params": {"lr": 1}}}, "type 'RMSProp'; did you mean RMSprop?"),
        ({"optimizer": {"type": "sat.opps.FusedAdam", "params": {"lr": 1}}}, "module 'sat.opps' does not exist"),
        ({"scheduler": {"type": "WarmpLR", "params": {}}}, "unknown scheduler.type 'WarmpLR'; did you mean WarmupLR?"),
        (optimizer(lr="fast"), "optimizer.params.lr: got 'fast'; expected a number"),
        (optimizer(betas=0.9), "optimizer.params.betas: got 0.9; expected two numbers"),
        (optimizer(betas=[0.9, 1]), "optimizer.params.betas: got 1; expected a number, at least 0 and below 1"),
        (optimizer(eps=-1), "optimizer.params.eps: got -1"),
        (optimizer(ema_decay=2), "optimizer.params.ema_decay: got 2; expected a number, at least 0 and below 1"),
    ],
)
def test_mistakes(changes, says):
    with pytest.raises(UserError) as error:
        checked(**changes)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_no_section():
    with pytest.raises(UserError, match=r"the deepspeed section: missing; name configs/sft\.yaml too"):
        check_deepspeed_config({})
