"""The `model:` section of files written for the original means what it means there."""

from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from arguments import get_args
from config_files import load_configs
from diffusion_video import SATVideoDiffusionEngine
from model_section import check_trained_part, has_adapter, not_trainable_prefixes, plain_model_section
from sgm.errors import UserError
from training_arguments import get_training_args
from training_plan import check_model

ROOT = Path(__file__).parents[2]
SFT = str(ROOT / "configs" / "sft.yaml")
MODEL = str(ROOT / "configs" / "cogvideox_2b.yaml")
LORA = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 256}}
PLACES = [
    {"lora_config": LORA},
    {"network_config": {"lora_config": LORA}},
    {"network_config": {"params": {"lora_config": LORA}}},
    {"network_config": {"params": {"modules": {"lora_config": LORA}}}},
]


@pytest.fixture
def training(tmp_path):
    def args(model: dict):
        path = tmp_path / "overlay.yaml"
        path.write_text(yaml.safe_dump({"model": model}))
        return get_training_args(["--base", MODEL, SFT, str(path)])

    return args


@pytest.mark.parametrize("place", PLACES)
def test_an_adapter_is_found_wherever_it_is_described(training, place, caplog):
    args = training({**place, "not_trainable_prefixes": ["all"]})
    assert args.model_config["network_config"]["params"]["modules"]["lora_config"] == LORA
    assert "lora_config" not in args.model_config and "lora_config" not in args.model_config["network_config"]
    assert "not used" not in caplog.text
    check_model(args)
    assert args.merged_config["model"] == args.model_config  # so that the run can be sampled


def test_the_same_for_sampling(tmp_path):
    path = tmp_path / "overlay.yaml"
    path.write_text(yaml.safe_dump({"model": PLACES[0]}))
    args = get_args(["--base", MODEL, str(path), "--input_file", "p.txt"])
    assert has_adapter(args.model_config)


def test_adapters_of_two_places_must_agree(training):
    same = {"lora_config": LORA, "network_config": {"params": {"modules": {"lora_config": LORA}}}}
    assert has_adapter(training(same).model_config)
    same["lora_config"] = {**LORA, "params": {"r": 8}}
    with pytest.raises(
        UserError, match=r"model\.lora_config and model\.network_config\.params\.modules\.lora_config describe"
    ):
        training(same)


def test_an_empty_adapter_is_none(training):
    args = training({"lora_config": None, "network_config": {"params": {"modules": {"lora_config": None}}}})
    assert not has_adapter(args.model_config)


def test_all_without_an_adapter_trains_nothing(training):
    with pytest.raises(UserError, match="nothing is to be trained"):
        check_model(training({"not_trainable_prefixes": ["all"]}))
    with pytest.raises(UserError, match="nothing is to be trained"):
        check_trained_part({"not_trainable_prefixes": "all"})


@pytest.mark.parametrize("prefixes", [7, [7], [""], {"a": 1}])
def test_prefixes_that_will_not_do(prefixes):
    with pytest.raises(UserError, match=r"model\.not_trainable_prefixes is"):
        not_trainable_prefixes({"not_trainable_prefixes": prefixes})


def test_a_text_is_a_list_of_one():
    assert not_trainable_prefixes({"not_trainable_prefixes": "all"}) == ("all",)
    assert not_trainable_prefixes({}) == ("first_stage_model", "conditioner")


def test_a_module_that_the_network_does_not_have(training):
    with pytest.raises(UserError, match="modules: unknown key 'lora_cfg'; did you mean lora_config"):
        training({"network_config": {"params": {"modules": {"lora_cfg": LORA}}}})


def test_an_omegaconf_section_is_resolved_and_a_plain_one_kept():
    section = OmegaConf.create({"a": 1, "b": {"c": "${a}", "d": [1, "${a}"]}})
    assert plain_model_section(section) == {"a": 1, "b": {"c": 1, "d": [1, 1]}}
    plain = {"a": 1}
    assert plain_model_section(plain) is plain
    with pytest.raises(UserError, match="model: Interpolation key 'gone' not found"):
        plain_model_section(OmegaConf.create({"a": "${gone}"}))
    with pytest.raises(UserError, match="model is None"):
        plain_model_section(None)


def trained(engine: SATVideoDiffusionEngine) -> set[str]:
    engine.disable_untrainable_params()
    return {name for name, parameter in engine.named_parameters() if parameter.requires_grad}


def test_the_engine_takes_the_original_s_section_as_a_dictconfig(tiny, one_thread):
    """LoRA as the original's guide prints it, built from Python: its matrices alone are trained."""
    section = load_configs([tiny.config("2b")])["model"]
    section |= {"lora_config": {**LORA, "params": {"r": 4}}, "not_trainable_prefixes": ["all"]}
    engine = SATVideoDiffusionEngine(Namespace(model_config=OmegaConf.create(section)))
    names = trained(engine)
    assert names and all(".matrix_A." in name or ".matrix_B." in name for name in names)
    assert isinstance(engine.config, dict)

    engine = SATVideoDiffusionEngine(Namespace(model_config={**section, "not_trainable_prefixes": ["model"]}))
    assert trained(engine) == names  # an adapter is trained whatever the prefixes
    del section["lora_config"]
    engine = SATVideoDiffusionEngine(
        Namespace(model_config={**section, "not_trainable_prefixes": ["model"]}), ("model",)
    )
    with pytest.raises(UserError, match=r"nothing is to be trained: model\.not_trainable_prefixes is"):
        engine.disable_untrainable_params()
