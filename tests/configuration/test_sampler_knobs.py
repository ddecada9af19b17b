"""Test that knobs of a sampler mean the same as the keys of the configuration."""

import copy
import inspect

import pytest

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.configuration.sampler_knobs import (
    ALPHA_SCHEDULE,
    GUIDERS,
    MODULE,
    NO_KNOBS,
    SAMPLERS,
    SCHEDULES,
    SHARED_PARAMETERS,
    SIGMA_SAMPLERS,
    VIDEO_PARAMETERS,
    SamplerKnobs,
    changed_sampler,
    check_steps,
    most_steps,
    sampler_class,
    samplers_for,
    usual_knobs,
)
from cogvideox_sat.files.shipped import CONFIGS
from sgm.errors import UserError


@pytest.fixture
def section():
    return load_configs([CONFIGS / "cogvideox_2b.yaml"])["model"]["sampler_config"]


def test_all_samplers_that_configurations_can_name():
    from sgm.modules.diffusionmodules import discretizer, guiders, sampling

    kinds = [kind for name in sampling.__all__ if inspect.isclass(kind := getattr(sampling, name))]
    concrete = [kind for kind in kinds if issubclass(kind, sampling.Sampler) and not inspect.isabstract(kind)]
    assert {kind.__name__ for kind in concrete} == set(SAMPLERS.values()) and sampling.__name__ == MODULE
    sigma = {kind.__name__ for kind in concrete if issubclass(kind, sampling.SigmaSampler)}
    assert sigma == set(SIGMA_SAMPLERS.values())
    assert set(inspect.signature(sampling.Sampler.__init__).parameters) == {"self", *SHARED_PARAMETERS}
    assert set(inspect.signature(sampling.VideoSampler.__init__).parameters) >= {"self", *VIDEO_PARAMETERS}
    assert getattr(discretizer, ALPHA_SCHEDULE).gives_alpha and guiders.__name__ == GUIDERS
    assert (*guiders.COUNTS, "constant") == SCHEDULES


@pytest.mark.parametrize("name", ["ddim", "DDIM", "VideoDDIMSampler", f"{MODULE}.VideoDDIMSampler"])
def test_names_of_a_sampler(name):
    assert sampler_class(name) == "VideoDDIMSampler"
    assert SamplerKnobs(name) == SamplerKnobs("ddim")


def test_dashes_do_for_underscores():
    assert sampler_class("dpmpp-2m") == "VPODEDPMPP2MSampler"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dimm", "sampler: got 'dimm'; did you mean ddim?"),
        ("VideoDDIMsampler", "did you mean VideoDDIMSampler?"),
        ("os.system", "it can be dpmpp_2m_sde, "),
    ],
)
def test_a_misspelt_sampler(name, says):
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        SamplerKnobs(name)


def test_without_knobs_nothing_changes(section):
    before = copy.deepcopy(section)
    assert changed_sampler(section, NO_KNOBS) == before
    assert section["params"]["guider_config"]["params"].items() >= {"scale": 6, "exp": 5}.items()


def test_each_knob_sets_its_keys_and_leaves_the_configuration_alone(section):
    before = copy.deepcopy(section)
    changed = changed_sampler(section, SamplerKnobs("ddim", 3, (0.25, 1), "diffusers"))
    expected = copy.deepcopy(before)
    expected["target"] = f"{MODULE}.VideoDDIMSampler"
    expected["params"]["guidance_interval"] = [0.25, 1]
    expected["params"]["guider_config"]["params"] |= {"scale": 3, "count": "diffusers"}
    assert changed == expected and section == before


def test_parameters_of_one_class_are_not_handed_to_another(section):
    section["params"] |= {"fixed_frames": 1, "discretization_config": {"target": "my.SigmaSchedule"}}
    assert changed_sampler(section, SamplerKnobs("ddpm"))["params"]["fixed_frames"] == 1
    euler = changed_sampler(section, SamplerKnobs("euler_ancestral"))
    assert "fixed_frames" not in euler["params"]
    euler["params"]["eta"] = 0.5
    assert changed_sampler(euler, SamplerKnobs(guidance_scale=2))["params"]["eta"] == 0.5
    assert "eta" not in changed_sampler(euler, SamplerKnobs("heun"))["params"]


def test_schedules_of_guidance_lead_from_one_to_the_other(section):
    constant = changed_sampler(section, SamplerKnobs(guidance_schedule="constant"))
    assert constant["params"]["guider_config"] == {"target": f"{GUIDERS}.VanillaCFG", "params": {"scale": 6}}
    again = changed_sampler(constant, SamplerKnobs(guidance_schedule="step", guidance_scale=4))
    expected = {"scale": 4, "exp": 5, "num_steps": 50, "count": "step"}
    assert again["params"]["guider_config"] == {"target": f"{GUIDERS}.DynamicCFG", "params": expected}


def test_knobs_that_the_configuration_has_no_place_for(section):
    with pytest.raises(UserError, match="sampler is 'EulerEDMSampler', which needs a noise schedule of sigma"):
        changed_sampler(section, SamplerKnobs("euler"))
    del section["params"]["guider_config"]
    for knobs in ({"guidance_scale": 2}, {"guidance_interval": (0, 0.5)}, {"guidance_schedule": "step"}):
        with pytest.raises(UserError, match=f"{next(iter(knobs))}: this model is sampled without guidance"):
            changed_sampler(section, SamplerKnobs(**knobs))
    guider = {"target": f"{GUIDERS}.VanillaCFG", "params": {"scale": 6}}
    own = {"target": "my_samplers.Mine", "params": {**section["params"], "guider_config": guider}}
    assert changed_sampler(own, SamplerKnobs(guidance_scale=2))["params"]["guider_config"]["params"] == {"scale": 2}
    with pytest.raises(UserError, match=r"guidance_interval: the sampler my_samplers.Mine does not take it"):
        changed_sampler(own, SamplerKnobs(guidance_interval=(0, 0.5)))


def test_steps_that_the_noise_schedule_does_not_have(section):
    from sgm.modules.diffusionmodules import discretizer

    schedules = ("EDMDiscretization", "LegacyDDPMDiscretization", ALPHA_SCHEDULE)
    assert {
        inspect.signature(getattr(discretizer, name)).parameters["num_timesteps"].default for name in schedules
    } == {most_steps(section)}
    check_steps(section, 1000, "steps")
    check_steps(section, None, "steps")
    with pytest.raises(UserError, match="steps: got 1001; this model's noise schedule has 1 to 1000 steps"):
        check_steps(section, 1001, "steps")
    section["params"]["discretization_config"] = {"target": "my.Schedule"}
    check_steps(section, 1001, "steps")
    assert most_steps(section) is None


def test_what_a_model_offers(section):
    assert list(samplers_for(section)) == ["dpmpp_2m_sde", "dpmpp_2m", "ddim", "ddpm"]
    usual = {"guidance_scale": 6, "guidance_interval": [0.0, 1.0], "guidance_schedule": "timestep"}
    assert usual_knobs(section) == {"sampler": "dpmpp_2m_sde", **usual}
    section["params"]["discretization_config"] = {"target": "sgm.modules.diffusionmodules.discretizer.EDM"}
    assert samplers_for(section) == SAMPLERS


def test_knobs_of_a_request_go_over_those_of_a_run():
    run, request = SamplerKnobs("ddim", 4), SamplerKnobs(guidance_scale=0, guidance_interval=(0.5, 1))
    assert request.over(run) == SamplerKnobs("ddim", 0, (0.5, 1))
    assert NO_KNOBS.over(NO_KNOBS) == NO_KNOBS and NO_KNOBS.given() == {}
