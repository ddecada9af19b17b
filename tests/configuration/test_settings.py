"""Test that settings are taken from objects of any kind that hold arguments."""

from argparse import Namespace
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from typing import ClassVar

import pytest
from omegaconf import OmegaConf

from cogvideox_sat.configuration.argument_fields import argument_fields
from cogvideox_sat.configuration.argument_lists import SamplingArguments, TrainingArguments, VaeTrainingArguments
from cogvideox_sat.configuration.settings import DataSettings, EngineSettings, LoopSettings
from sgm.config_places import Sources
from sgm.errors import UserError

MODEL = {"network_config": {}}


@pytest.mark.parametrize("wrap", [dict, lambda values: Namespace(**values), lambda values: type("Args", (), values)])
def test_settings_of_any_object(wrap):
    """A mapping, a Namespace with what other parts need too, or a class with attributes."""
    args = wrap({"model_config": MODEL, "bf16": True, "lora_scale": None, "force_inference": None, "train_iters": 3})
    settings = EngineSettings.from_args(args)
    assert (settings.model_config, settings.bf16, settings.fp16, settings.load) == (MODEL, True, False, None)
    assert (settings.lora_scale, settings.force_inference) == (None, False)
    assert settings.arguments is args
    assert LoopSettings.from_args(args).train_iters == 3


def test_changes_take_precedence_even_none():
    args = Namespace(model_config=MODEL, data_config={}, load="a", lora_load="b")
    assert EngineSettings.from_args(args, load=None).load is None
    assert DataSettings.from_args(args, model_config=None).model_config is None
    settings = EngineSettings(MODEL, load="a")
    assert EngineSettings.from_args(settings) is settings
    assert EngineSettings.from_args(settings, bf16=True) == replace(settings, bf16=True)


def test_a_misspelt_setting_is_an_error():
    with pytest.raises(TypeError, match="lora_laod"):
        EngineSettings(MODEL, lora_laod="adapter")
    with pytest.raises(UserError, match=r"lora_laod: EngineSettings has no such setting; did you mean lora_load\?"):
        EngineSettings.from_args({"model_config": MODEL}, lora_laod="adapter")
    with pytest.raises(UserError, match=r"lora_laod: unknown argument; did you mean lora_load\?"):
        EngineSettings.from_args(Namespace(model_config=MODEL, lora_laod="adapter"))
    with pytest.raises(UserError, match=r"train_iter: unknown argument; did you mean train_iters\?"):
        LoopSettings.from_args({"train_iter": 10})
    with pytest.raises(UserError, match="train_iters: missing; LoopSettings needs it"):
        LoopSettings.from_args({})
    with pytest.raises(FrozenInstanceError):
        EngineSettings(MODEL).load = "other"


def test_what_the_original_has_beside_them_is_no_mistake():
    """SwissArmyTransformer's arguments, some similar to ours, and a user's own are accepted."""
    foreign = {"wandb_project_name": "p", "exit_interval": 3, "test_data": [], "load_path": "x", "num_layers": 30}
    foreign |= {"save_args": True, "checkpoint_num_layers": 1, "mine": 1, "eval_iters": 2, "my_load": "y"}
    args = Namespace(model_config=MODEL, data_config={}, train_iters=5, **foreign)
    for kind in (EngineSettings, DataSettings, LoopSettings):
        assert kind.from_args(args).as_args().mine == 1


def test_classes_of_users_see_all_arguments_with_the_settings_in_their_place():
    settings = EngineSettings.from_args(Namespace(model_config=MODEL, load="old", mine=7), load="new")
    args = settings.as_args()
    assert (args.load, args.mine, args.bf16) == ("new", 7, False)
    alone = EngineSettings(MODEL)
    assert alone.as_args() is alone


@pytest.mark.parametrize("command", [SamplingArguments, TrainingArguments, VaeTrainingArguments])
@pytest.mark.parametrize("kind", [EngineSettings, DataSettings, LoopSettings])
def test_arguments_and_settings_agree(command, kind):
    """Every command's arguments give settings with the same values, of the promised types."""
    args = command(model_config=MODEL)
    if command is SamplingArguments and kind is not EngineSettings:
        return
    settings = kind.from_args(args)
    for f in fields(kind):
        if hasattr(args, f.name) and getattr(args, f.name) is not None:
            assert getattr(settings, f.name) == getattr(args, f.name), f.name


def test_no_setting_is_without_an_argument():
    """Every setting has an argument on the command line, except settings for programs."""
    programs_only = {"new_adapter", "model_cls", "sources", "arguments", "merged_config", "model_config", "data_config"}
    programs_only |= {"vae_waiting_bytes"}  # what `fit` leaves
    programs_only |= {"weights_in_shares"}  # set if the DeepSpeed section has ZeRO-3
    known = {n for c in (SamplingArguments, TrainingArguments, VaeTrainingArguments) for n in argument_fields(c)}
    for kind in (EngineSettings, DataSettings, LoopSettings):
        assert {f.name for f in fields(kind)} - known <= programs_only


def test_settings_are_the_same_wherever_they_are_from():
    @dataclass
    class Mine:
        model_config: dict

    sources = Sources(["a.yaml"])
    assert EngineSettings.from_args(Mine(MODEL)) == EngineSettings(MODEL, sources=sources)


class Slots:
    __slots__ = ("mine", "model_config", "unset")

    def __init__(self):
        self.model_config, self.mine = {}, 7


class OfClass:
    model_config: ClassVar[dict] = {}
    mine = 7

    def method(self):  # is no setting
        raise AssertionError


class OfProperty(Slots):
    @property
    def mine(self):
        return 7

    @mine.setter
    def mine(self, value):
        pass


@pytest.mark.parametrize("args", [Slots(), OfClass(), OfClass, OfProperty(), {"model_config": {}, "mine": 7, 1: 2}])
def test_classes_of_users_see_what_is_no_attribute_of_the_object_itself(args):
    seen = EngineSettings.from_args(args).as_args()
    assert seen.mine == 7
    assert not hasattr(seen, "unset")


@pytest.mark.parametrize("value", ["???", "${nowhere}"])
def test_a_value_that_omegaconf_lacks_is_an_error(value):
    with pytest.raises(UserError, match=r"^load: "):
        EngineSettings.from_args(OmegaConf.create({"model_config": {}, "load": value}))
