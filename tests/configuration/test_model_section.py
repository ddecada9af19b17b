"""Test that the `model:` section of the original's files has the same meaning here."""

from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from arguments import get_args
from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.model_section import (
    NETWORK,
    check_trained_part,
    has_adapter,
    not_trainable_prefixes,
    plain_model_section,
)
from cogvideox_sat.configuration.model_values import check_model_values
from cogvideox_sat.configuration.training_arguments import get_training_args
from cogvideox_sat.training.plan import check_model
from diffusion_video import SATVideoDiffusionEngine
from sgm.errors import UserError

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


def test_how_many_samples_the_first_stage_takes_at_once(training, caplog):
    """The key is used, and a wrong value is found before anything is read."""
    args = training({"en_and_decode_n_samples_a_time": 2})
    assert "not used" not in caplog.text
    assert SATVideoDiffusionEngine(args, parts=()).samples_at_a_time == 2
    for wrong in (0, "two", 1.5, True):
        args = training({"en_and_decode_n_samples_a_time": wrong})
        place = r"overlay\.yaml: model\.en_and_decode_n_samples_a_time"
        with pytest.raises(UserError, match=place + ": got .*; expected a whole number from 1"):
            check_model_values(args.model_config, args.sources)


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
    with pytest.raises(UserError, match=r"model\.not_trainable_prefixes: got"):
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
    with pytest.raises(UserError, match="model: got None"):
        plain_model_section(None)


def trained(engine: SATVideoDiffusionEngine) -> set[str]:
    engine.disable_untrainable_params()
    return {name for name, parameter in engine.named_parameters() if parameter.requires_grad}


def test_the_engine_takes_the_original_s_section_as_a_dictconfig(tiny, one_thread):
    """LoRA is configured as in the original's guide; only its matrices are trained."""
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
    with pytest.raises(UserError, match=r"model\.not_trainable_prefixes is .*, so that nothing is to be trained"):
        engine.disable_untrainable_params()


# ---------------------------------------------------------------------------------------------------------------------
# Both dialects of released files
# ---------------------------------------------------------------------------------------------------------------------


def network_params(name: str) -> dict:
    return load_configs([ROOT / "configs" / name])["model"]["network_config"]["params"]


@pytest.mark.parametrize(("patch_size", "kernel"), [(2, (1920, 16, 2, 2)), ([2, 2, 2], (1920, 16 * 8))])
def test_patch_sizes_of_both_dialects(patch_size, kernel):
    from cogvideox_sat.configuration.meta_device import instantiate_on_meta

    params = network_params("cogvideox_2b.yaml") | {"patch_size": patch_size, "num_layers": 1, "num_frames": 45}
    network = instantiate_on_meta({"target": NETWORK, "params": params})
    assert tuple(network.mixins["patch_embed"].proj.weight.shape) == kernel
    assert ModelLimits.from_config({"network_config": {"params": params}}).patch[1:] == (2, 2)


def test_interpolation_moves_the_positions():
    """The factors follow from the table's numbers, not from its shape."""
    from cogvideox_sat.network.position_tables import sincos_3d
    from sgm.util import instantiate_from_config

    params = network_params("cogvideox_2b.yaml")
    params |= {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "time_embed_dim": 32, "num_frames": 9}
    params |= {"latent_height": 8, "latent_width": 12}
    position = params["modules"]["pos_embed_config"]["params"]
    tables = []
    for target in (position, params):
        for name in ("height_interpolation", "width_interpolation"):
            position.pop(name, None), params.pop(name, None)
        target |= {"height_interpolation": 2.5, "width_interpolation": 2.0}
        network = instantiate_from_config({"target": NETWORK, "params": params})
        tables.append(network.mixins["pos_embed"].pos_embedding[0, -3 * 4 * 6 :])
    assert tables[0].equal(tables[1]) and tables[0].equal(sincos_3d(64, (3, 4, 6), 1.0, 2.5, 2.0))
