"""A configuration's classes are checked before calls; errors have file and key.

A mistake of this program keeps its traceback.
"""

import pytest
import torch
from torch import nn

from cogvideox_sat.configuration.files import load_configs
from sgm.config_blame import BUILDERS
from sgm.config_places import Sources, section
from sgm.errors import UserError
from sgm.modules.diffusionmodules.denoiser_scaling import VideoScaling
from sgm.util import get_obj_from_str, instantiate_from_config
from training_runs import ROOT

MODULES = "sgm.modules.diffusionmodules"


@pytest.fixture
def model():
    """Return the model section of a shipped file and its sources."""
    config = load_configs([ROOT / "configs" / "tiny" / "cogvideox_tiny.yaml"])
    return config["model"], config.sources


def refused(config, sources, name: str) -> str:
    with section("model", config, sources), pytest.raises(UserError) as error:
        instantiate_from_config(config[name])
    return str(error.value)


class Thing:
    """A class of a user's own."""

    def __init__(self, size: int = 1):
        self.size = size
        if size > 5:
            raise ValueError("too large for me")

    def __call__(self, sigma):
        return sigma


def test_a_function_is_not_called(model, tmp_path):
    config, sources = model
    canary = tmp_path / "canary"
    for evil in (
        {"target": "subprocess.getoutput", "params": {"cmd": f"touch {canary}"}},
        {"target": "subprocess.Popen", "params": {"args": ["touch", str(canary)]}},
        {"target": "logging.FileHandler", "params": {"filename": str(canary)}},
        {"target": "builtins.open", "params": {"file": str(canary), "mode": "w"}},
        {"target": "os.system", "params": {"command": f"touch {canary}"}},
        {"target": "zipfile.ZipFile", "params": {"file": str(canary), "mode": "w"}},
        {"target": "torch.nn.functional", "params": {}},
    ):
        for place in ("weighting_config", "scaling_config", "discretization_config"):
            params = {**config["denoiser_config"]["params"], place: evil}
            changed = {**config, "denoiser_config": {**config["denoiser_config"], "params": params}}
            assert f"model.denoiser_config.params.{place}.target: {evil['target']} is not a class of" in refused(
                changed, sources, "denoiser_config"
            )
        embedders = {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": [{**evil, "input_key": "a"}]}}
        line = refused({"conditioner_config": embedders}, sources, "conditioner_config")
        assert "model.conditioner_config.params.emb_models[0].target" in line
    assert not canary.exists()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("num_idx", "x", ".params.num_idx: got 'x'; expected a whole number"),
        ("num_idx", True, ".params.num_idx: got True; expected a whole number"),
        ("num_ids", 3, ".params.num_ids: unknown; did you mean num_idx?"),
        ("quantize_c_noise", [], ".params.quantize_c_noise: got []; expected true or false"),
        ("scaling_config", 1e30, ".params.scaling_config: got 1e+30; expected keys and values"),
        ("scaling_config", {}, ".params.scaling_config: expected a mapping with the key 'target'"),
        ("scaling_config", {"target": None}, ".params.scaling_config.target: got None; expected an import path"),
        ("scaling_config", {"target": f"{MODULES}.gone.A"}, ".params.scaling_config.target: target"),
        ("scaling_config", {"target": "torch.nn.Linear"}, ".params.scaling_config.params: "),
        ("discretization_config", {"target": f"{MODULES}.discretizer.Discretization"}, "is abstract"),
    ],
)
def test_the_file_and_the_key_of_a_wrong_parameter(model, key, value, says):
    config, sources = model
    params = {**config["denoiser_config"]["params"], key: value}
    changed = {**config, "denoiser_config": {**config["denoiser_config"], "params": params}}
    line = refused(changed, sources, "denoiser_config")
    assert line.startswith(f"{ROOT}/configs/")
    assert "model.denoiser_config" in line and says in line


def test_a_parameter_that_is_missing(model):
    config, sources = model
    params = {name: value for name, value in config["denoiser_config"]["params"].items() if name != "num_idx"}
    changed = {**config, "denoiser_config": {**config["denoiser_config"], "params": params}}
    line = refused(changed, sources, "denoiser_config")
    assert "model.denoiser_config.params: num_idx: missing; it needs a whole number" in line


def test_what_a_class_of_the_users_own_raises_is_reported_with_its_key():
    config = {"a": {"weighting_config": {"target": f"{__name__}.Thing", "params": {"size": 7}}}}
    sources = Sources(["mine.yaml"])
    with section("model", config, sources), pytest.raises(UserError) as error:
        instantiate_from_config(config["a"]["weighting_config"])
    assert str(error.value).startswith("mine.yaml: model.a.weighting_config: ")
    assert "ValueError: too large for me" in str(error.value)
    with section("model", config, sources):
        assert instantiate_from_config({**config["a"]["weighting_config"], "params": {"size": 2}}).size == 2


def test_sizes_that_do_not_go_together_are_reported_with_the_innermost_key(model):
    config, sources = model
    encoder = config["first_stage_config"]["params"]["encoder_config"]
    encoder["params"]["dropout"] = 7.0
    config["first_stage_config"]["params"]["ckpt_path"] = None
    line = refused(config, sources, "first_stage_config")
    assert "model.first_stage_config.params.encoder_config: " in line and "--debug" in line


@pytest.mark.parametrize("mistake", [AttributeError, TypeError, KeyError, RuntimeError, ValueError, AssertionError])
def test_a_mistake_of_this_program_in_a_constructor_keeps_its_traceback(model, monkeypatch, mistake):
    config, sources = model

    def planted(self):
        raise mistake("planted")

    monkeypatch.setattr(VideoScaling, "__init__", planted)
    monkeypatch.setattr("sgm.config_blame.is_own_file", lambda name: name == __file__ or "/sgm/" in name)
    with section("model", config, sources), pytest.raises(mistake, match="planted"):
        instantiate_from_config(config["denoiser_config"])


def test_a_name_that_does_not_exist_is_a_mistake_of_this_program(model, monkeypatch):
    config, sources = model

    def planted(self, *args, **kwargs):
        nothing_of_this_name  # noqa: B018, F821

    monkeypatch.setattr(f"{MODULES}.discretizer.ZeroSNRDDPMDiscretization.__init__", planted)
    monkeypatch.setattr("sgm.config_blame.is_own_file", lambda name: name == __file__ or "/sgm/" in name)
    with section("model", config, sources), pytest.raises(NameError):
        instantiate_from_config(config["denoiser_config"])


def test_out_of_memory_passes_through(model, monkeypatch):
    config, sources = model

    def full(self):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(VideoScaling, "__init__", full)
    with section("model", config, sources), pytest.raises(torch.OutOfMemoryError):
        instantiate_from_config(config["denoiser_config"])


def test_without_a_section_the_target_is_named():
    with pytest.raises(UserError, match=r"denoiser_scaling\.EDMScaling: params\.sigma: unknown"):
        instantiate_from_config({"target": f"{MODULES}.denoiser_scaling.EDMScaling", "params": {"sigma": 1}})
    with pytest.raises(UserError, match="got the keys"):
        instantiate_from_config({"params": {}})
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity"}), nn.Identity)


def test_a_module_of_the_users_own_that_fails_when_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import nothing_that_is_installed\nclass A: pass\n")
    (tmp_path / "raising_module.py").write_text("raise OSError('no')\nclass A: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="importing it fails with ModuleNotFoundError"):
        get_obj_from_str("broken_module.A")
    with pytest.raises(UserError, match="importing it fails with OSError"):
        get_obj_from_str("raising_module.A")


def test_a_class_in_the_place_of_another_is_the_configuration_s_mistake(model):
    """Both are called with numbers, but another object uses an attribute that is missing."""
    config, sources = model
    config["denoiser_config"]["params"]["scaling_config"] = {
        "target": f"{MODULES}.discretizer.ZeroSNRDDPMDiscretization"
    }
    line = refused(config, sources, "denoiser_config")
    assert "model.denoiser_config: " in line and "'takes_alpha'" in line


def test_an_attribute_that_is_missing_in_our_own_object_is_a_mistake_of_this_program(model, monkeypatch):
    config, sources = model
    params = config["denoiser_config"]["params"]
    params["scaling_config"] = {"target": f"{MODULES}.denoiser_scaling.EDMScaling"}  # no shipped file names it
    params["discretization_config"] = {"target": f"{MODULES}.discretizer.EDMDiscretization"}

    def planted(self, *args, **kwargs):
        return self.nothing_of_this_name

    monkeypatch.setattr(f"{MODULES}.discretizer.EDMDiscretization.__call__", planted)
    monkeypatch.setattr("sgm.config_blame.is_own_file", lambda name: name == __file__ or "/sgm/" in name)
    with section("model", config, sources), pytest.raises(AttributeError, match="nothing_of_this_name"):
        instantiate_from_config(config["denoiser_config"])


def test_a_mistake_of_this_program_in_the_text_encoder_keeps_its_traceback(model, monkeypatch):
    config, sources = model

    def planted(self, *args, **kwargs):
        raise TypeError("planted")

    monkeypatch.setattr("sgm.modules.encoders.modules.FrozenT5Embedder.__init__", planted)
    monkeypatch.setattr("sgm.config_blame.is_own_file", lambda name: name == __file__ or "/sgm/" in name)
    with section("model", config, sources), pytest.raises(TypeError, match="planted"):
        instantiate_from_config(config["conditioner_config"])


def test_builders_are_functions_of_this_project():
    sources = "".join(file.read_text() for folder in ("sgm", "sat") for file in (ROOT / folder).rglob("*.py"))
    assert [name for name in BUILDERS if f"def {name}(" not in sources] == []
