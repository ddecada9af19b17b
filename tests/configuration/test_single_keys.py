"""Test that keys set one by one take precedence over files, and errors name them."""

import pytest

from arguments import get_args
from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.single_keys import parse_settings, set_keys
from cogvideox_sat.files.shipped import CONFIGS
from sgm.config_places import Sources
from sgm.errors import UserError

GUIDER = "model.sampler_config.params.guider_config.params"
TINY = CONFIGS / "tiny" / "cogvideox_tiny.yaml"


def test_values_are_written_as_in_yaml():
    texts = ["a.b=7", "c=1e-3", "d=[1, 2]", "e=", "f=x=y", "g=true", "h={i: 1}"]
    expected = {"a.b": 7, "c": 1e-3, "d": [1, 2], "e": None, "f": "x=y", "g": True, "h": {"i": 1}}
    assert parse_settings(texts) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model.x", "expected KEY=VALUE"),
        ("=7", "expected KEY=VALUE"),
        ("model.x=[1", "--set model.x, line 2: not valid"),
    ],
)
def test_texts_of_another_form(text, says):
    with pytest.raises(UserError, match=says):
        parse_settings([text])


def test_keys_are_set_on_top_of_files_before_references_are_followed(tmp_path):
    path = tmp_path / "more.yaml"
    path.write_text("args: {load: a.pt, output_dir: '${args.load}.videos'}\nmodel: {scale_factor: 2.0}\n")
    settings = {"args.load": "b.pt", f"{GUIDER}.scale": 7, f"{GUIDER}.count": "step"}
    settings |= {"model.conditioner_config.params.emb_models[0].ucg_rate": 0.5, "model.first_stage_config.params": {}}
    config = load_configs([TINY, path], settings=settings)
    assert config["args"]["output_dir"] == "b.pt.videos" and config["model"]["scale_factor"] == 2.0
    guider = config["model"]["sampler_config"]["params"]["guider_config"]["params"]
    assert guider == {"scale": 7, "exp": 5, "num_steps": 50, "count": "step"}
    assert config["model"]["conditioner_config"]["params"]["emb_models"][0]["ucg_rate"] == 0.5
    assert config["model"]["first_stage_config"]["params"]["ckpt_path"], "mappings are merged"
    assert config.sources.file_of(("model", "sampler_config", "params", "guider_config", "params", "scale")) == "--set"


def test_what_is_referred_to_can_be_changed_in_one_place(tmp_path):
    path = tmp_path / "shared.yaml"
    path.write_text("data: {target: a.B, params: {one: {x: 1, y: 2}, two: '${data.params.one}'}}\n")
    config = load_configs([path], used=(), settings={"data.params.two.x": 5})
    assert config["data"]["params"] == {"one": {"x": 1, "y": 2}, "two": {"x": 5, "y": 2}}


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("modle.scale_factor", "the section 'modle' does not exist; did you mean model"),
        ("model.scale_facto", "model has no 'scale_facto'; did you mean scale_factor"),
        ("model.sampler_confg.params.num_steps", "model has no 'sampler_confg'; did you mean sampler_config"),
        ("model.sampler_config.parms.num_steps", "model.sampler_config has no 'parms'; did you mean params"),
        ("model.sampler_config.params.num_step", "has no 'num_step'; did you mean num_steps"),
        (f"{GUIDER}.scal", "has no 'scal'; did you mean scale"),
        ("model.network_config.params.modules.lora_confg", "has no 'lora_confg'; did you mean lora_config"),
        ("model.conditioner_config.params.emb_models[1].ucg_rate", "emb_models is a list of 1"),
        ("model.conditioner_config.params.emb_models.x", "emb_models is a list of 1"),
        ("model.scale_factor.x", "model.scale_factor is 1.0, which has no keys"),
        ("model", "model: got 7; expected keys and values"),
        ("", "the section '' does not exist"),
    ],
)
def test_a_key_that_does_not_exist(key, says):
    with pytest.raises(UserError, match=says.replace("[", r"\[")) as caught:
        load_configs([TINY], settings={key: 7})
    assert str(caught.value).startswith(f"--set {key}"[:12]) and "\n" not in str(caught.value)


def test_keys_that_only_classes_of_others_know_are_theirs_to_refuse():
    config = {"model": {"network_wrapper": None, "sampler_config": {"target": "my.Sampler"}}}
    set_keys(config, Sources(), {"model.sampler_config.params.anything": (1, 2)})
    assert config["model"]["sampler_config"]["params"] == {"anything": [1, 2]}
    with pytest.raises(UserError, match="is a object"):
        set_keys(config, Sources(), {"model.sampler_config.params.other": object()})


def test_the_command_takes_them():
    args = get_args(["--base", str(TINY), "--set", f"{GUIDER}.scale=7", "args.steps=4", "--set", "args.seed=5"], False)
    assert (args.model_config["sampler_config"]["params"]["guider_config"]["params"]["scale"]) == 7
    assert (args.sampling_num_steps, args.seed) == (4, 5)
    assert get_args(["--base", str(TINY), "--set", "args.seed=5", "--seed", "6"], False).seed == 6
    for setting, says in (
        ("args.sede=5", "--set: args: unknown key 'sede'; did you mean seed"),
        (f"{GUIDER}.scale=x", ""),
    ):
        if says:
            with pytest.raises(UserError, match=says):
                get_args(["--base", str(TINY), "--set", setting], False)
