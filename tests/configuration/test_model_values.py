"""Test that the `model:` and `data:` sections are checked before PyTorch is imported."""

import copy

import pytest

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.model_values import check_data_section, check_model_values, check_parameters
from sgm.config_places import Sources
from sgm.errors import UserError
from training_runs import ROOT

SOURCES = Sources(["mine.yaml"])
NETWORK = "network_config.params"


@pytest.fixture(scope="module")
def model():
    return load_configs([ROOT / "configs" / "cogvideox1.5_5b_i2v_lora.yaml"])["model"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("cogvideox*.yaml")), ids=lambda path: path.name)
def test_shipped_models_pass(path):
    config = load_configs([path])
    check_model_values(config["model"], config.sources)
    check_parameters({"model": config["model"]}, config.sources)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale_factor", []),
        ("scale_factor", 0),
        ("scale_factor", "0.7"),
        ("scale_factor", float("inf")),
        ("log_keys", [5]),
        ("log_keys", {"a": 1}),
        ("input_key", 7),
        ("latent_input", "perhaps"),
        ("noised_image_dropout", 2),
        ("not_trainable_prefixes", [None]),
        ("compile_model", []),
        ("network_wrapper", ["a"]),
        (f"{NETWORK}.num_layers", 10**20),
        (f"{NETWORK}.num_layers", 0),
        (f"{NETWORK}.hidden_size", -1),
        (f"{NETWORK}.hidden_size", 10**9),
        (f"{NETWORK}.time_embed_dim", 2**40),
        (f"{NETWORK}.num_frames", 10**12),
        (f"{NETWORK}.latent_height", 10**6),
        (f"{NETWORK}.modules.pos_embed_config", 1e30),
        (f"{NETWORK}.modules.pos_embed_config.params", [1]),
        (f"{NETWORK}.modules.pos_embed_config.params.text_length", 10**9),
        (f"{NETWORK}.modules.pos_embed_config.target", None),
        (f"{NETWORK}.modules.lora_config.params.r", 10**12),
        (f"{NETWORK}.transformer_args.vocab_size", 10**12),
        (f"{NETWORK}.unheard_of", 3 * 10**30),
        ("first_stage_config.params.encoder_config.params.ch", 10**9),
        ("first_stage_config.params.encoder_config.params.ch_mult", []),
        ("first_stage_config.params.encoder_config.params.ch_mult", [1] * 40),
        ("first_stage_config.params.encoder_config.params.ch_mult", [1, "x"]),
        ("first_stage_config.params.encoder_config.params.ch_mult", [1, 10**9]),
        ("conditioner_config.params.emb_models", {}),
        ("conditioner_config.params.emb_models", [None]),
        ("conditioner_config.params.emb_models.0.ucg_rate", 3),
        ("conditioner_config.params.emb_models.0.input_key", []),
        ("conditioner_config.params.emb_models.0.is_trainble", True),
        ("conditioner_config.params.emb_models.0.params.max_length", 10**12),
        ("sampler_config.params.num_steps", 10**12),
        ("sampler_config.parms", {}),
        ("denoiser_config.params.num_idx", 10**15),
        ("denoiser_config.params.discretization_config", "x"),
    ],
)
def test_values_that_do_not_fit(model, key, value):
    with pytest.raises(UserError) as error:
        check_model_values(with_value(model, key, value), SOURCES)
    line = str(error.value)
    *_, parent, last = ("model", *(part for part in key.split(".") if not part.isdecimal()))
    assert line.startswith("mine.yaml: model.") and (last in line or parent in line)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{NETWORK}.elementwise_affine", "x"),
        (f"{NETWORK}.num_layers", "30"),
        (f"{NETWORK}.num_layers", None),
        (f"{NETWORK}.num_layer", 30),
        (f"{NETWORK}.patch_size", [2, None]),
        ("sampler_config.params.num_steps", ""),
        ("sampler_config.params.verbos", True),
        ("first_stage_config.params.encoder_config.params.ch", "x"),
        ("first_stage_config.params.ckpt_path", [1]),
        ("denoiser_config.params.quantize_c_noise", 0.5),
    ],
)
def test_parameters_of_our_classes_are_read_off_their_source(model, key, value):
    with pytest.raises(UserError) as error:
        check_parameters({"model": with_value(model, key, value)}, SOURCES)
    assert str(error.value).startswith(f"mine.yaml: model.{key}")


def test_the_data_section():
    good = {"target": "data_video.SFTDataset", "params": {"fps": 8}}
    check_data_section(good, SOURCES)
    check_data_section({"target": "my_data.Mine", "params": None}, SOURCES)
    for bad in ({**good, "target": None}, {**good, "params": 5}, {**good, "parms": {}}, {"params": {}}):
        with pytest.raises(UserError, match=r"^mine\.yaml: data\."):
            check_data_section(bad, SOURCES)


def with_value(model, key: str, value):
    model = copy.deepcopy(model)
    node, (*path, last) = model, key.split(".")
    for part in path:
        node = node[int(part) if part.isdecimal() else part]
    node[last] = value
    return model
