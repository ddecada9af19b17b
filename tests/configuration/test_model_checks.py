"""Test that a model's parts are tried without memory, and errors name file and key."""

import copy
import time
from dataclasses import replace

import pytest
import torch

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.model_checks import check_autoencoder_sizes, check_model
from cogvideox_sat.configuration.model_values import check_model_values
from cogvideox_sat.configuration.settings import EngineSettings
from sgm.config_places import section
from sgm.errors import UserError
from sgm.modules.diffusionmodules.loss import VideoDiffusionLoss
from sgm.modules.diffusionmodules.sampling import VPSDEDPMPP2MSampler
from sgm.util import instantiate_from_config
from training_runs import ROOT

PARTS = ("conditioner", "first_stage_model", "model")
SAMPLER, LOSS, NETWORK = "sampler_config", "loss_fn_config", "network_config"


@pytest.fixture(scope="module")
def shipped():
    return load_configs([ROOT / "configs" / "tiny" / "cogvideox_tiny_lora.yaml"])


def changed(config, key: str, value):
    """Return settings whose model has `value` at a dotted key; `...` removes the key."""
    model = copy.deepcopy(config["model"])
    node, (*path, last) = model, key.split(".")
    for part in path:
        node = node[int(part) if part.isdecimal() else part]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return EngineSettings(model, sources=config.sources, load="weights", model_parallel_size=1)


def test_a_shipped_model_passes_and_random_numbers_go_on(shipped):
    state = torch.random.get_rng_state()
    check_model(changed(shipped, "scale_factor", 1.0), PARTS)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{NETWORK}.params.num_attention_heads", 7),
        (f"{NETWORK}.params.modules.pos_embed_config.params.hidden_size_head", 33),
        (f"{NETWORK}.params.modules.pos_embed_config.target", "dit_video_concat.AdaLNMixin"),
        (f"{NETWORK}.params.modules.final_layer_config", ...),
        (f"{NETWORK}.params.transformer_args.layernorm_order", "middle"),
        (f"{NETWORK}.params.modules.lora_config.params.r", "four"),
        (f"{NETWORK}.params.transformer_args.vocab_size", []),
        (f"{SAMPLER}.params.guider_config.params.num_steps", 0),
        (f"{SAMPLER}.params.num_steps", 5000),
        (f"{SAMPLER}.params.guider_config.target", "sgm.modules.diffusionmodules.discretizer.EDMDiscretization"),
        (f"{SAMPLER}.params.discretization_config.params.shift_scale", 0),
        (f"{LOSS}.params.sigma_sampler_config.target", "sgm.modules.diffusionmodules.sigma_sampling.EDMSampling"),
        ("first_stage_config.params.encoder_config.params.dropout", 5.0),
        ("first_stage_config.params.decoder_config.params.norm_groups", 7),
        ("conditioner_config.params.emb_models.0.params.max_lenght", 3),
        ("conditioner_config.params.emb_models.0.target", "torch.nn.Identity"),
    ],
)
def test_the_file_and_key_or_its_parent_are_named(shipped, key, value):
    settings = changed(shipped, key, value)
    with pytest.raises(UserError) as error:
        check_model_values(settings.model_config, settings.sources)  # as commands do
        check_model(settings, PARTS)
    line = str(error.value)
    assert line.startswith(f"{ROOT}/configs/")
    *parents, last = [part for part in key.split(".") if part not in ("params", "0", "target")]
    assert "model." in line and (last in line or parents[-1] in line), line


@pytest.mark.parametrize("mistake", [AttributeError, TypeError, RuntimeError, KeyError, ZeroDivisionError])
@pytest.mark.parametrize(("kind", "method"), [(VPSDEDPMPP2MSampler, "sample"), (VideoDiffusionLoss, "noise_like")])
def test_a_mistake_of_ours_in_what_is_tried_keeps_its_traceback(shipped, monkeypatch, kind, method, mistake):
    def planted(*_):
        raise mistake("planted")

    monkeypatch.setattr(kind, method, planted)
    with pytest.raises(mistake, match="planted"):
        check_model(changed(shipped, "scale_factor", 1.0), ("model",))


def test_a_mistake_of_ours_in_the_network_keeps_its_traceback(shipped, monkeypatch):
    def planted(*_):
        raise ValueError("planted")

    monkeypatch.setattr("dit_video_concat.patch_sizes", planted)
    with pytest.raises(ValueError, match="planted"):
        check_model(changed(shipped, "scale_factor", 1.0), ("model",))


def test_a_network_larger_than_the_machine_is_refused_before_it_is_built(shipped, monkeypatch):
    monkeypatch.setattr("cogvideox_sat.configuration.model_checks.host_memory", lambda: 2**20)
    settings = replace(changed(shipped, "scale_factor", 1.0), load=None)
    with pytest.raises(UserError, match=r"model\.network_config\.params: with these sizes it takes"):
        check_model(settings, ("model",))
    check_model(replace(settings, load="weights"), ("model",))


def test_the_check_takes_little_time(shipped):
    settings = changed(shipped, "scale_factor", 1.0)
    check_model(settings, PARTS)
    started = time.process_time()
    check_model(settings, PARTS)
    assert time.process_time() - started < 5


def test_trying_a_sampler_leaves_it_as_it_was(shipped):
    sampler = instantiate_from_config(shipped["model"][SAMPLER])
    assert sampler.verbose is True


def test_a_sampler_of_the_users_own_is_built_but_not_tried(shipped):
    settings = changed(shipped, f"{SAMPLER}.target", f"{__name__}.Picky")
    check_model(settings, ())


class Picky(VPSDEDPMPP2MSampler):
    """Class that takes only known parameters."""

    def __call__(self, *settings, **kwargs):
        raise AssertionError("not with these latents")


def test_an_autoencoder_that_no_machine_holds_is_refused_before_it_is_built():
    config = load_configs([ROOT / "configs" / "tiny" / "vae_images.yaml"])
    params = config["model"]["params"]
    with section("model", config["model"], config.sources):
        check_autoencoder_sizes(params)
        for place in (("decoder_config",), ("loss_config", "params", "discriminator_config")):
            changed = copy.deepcopy(config["model"])
            part = changed["params"]
            for name in place:
                part = part[name]
            part["params"] = {**part.get("params", {}), **({"ch": 2**16} if len(place) == 1 else {"ndf": 2**15})}
            with section("model", changed, config.sources), pytest.raises(UserError) as error:
                check_autoencoder_sizes(changed["params"])
            assert f": model.params.{'.'.join(place)}.params: with these sizes it takes " in str(error.value)


@pytest.mark.parametrize("steps", [1001, 10**12])
def test_more_steps_than_there_are_are_refused_by_the_argument_s_name(shipped, steps):
    settings = changed(shipped, "scale_factor", 1.0)
    check_model(settings, (), 1000)
    with pytest.raises(UserError, match=f"^sampling_num_steps.*: got {steps}"):
        check_model(settings, (), steps)
