"""Several unmerged adapters of all kinds equal the merged checkpoint.

Strength 0 equals no adapter to the bit.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import cogvideox_sat as cv
from arguments import get_args
from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.conversion.lora_files import read_adapter
from cogvideox_sat.memory.sampling_peaks import MemoryPolicy
from cogvideox_sat.sampling import fitting as fitting_module
from cogvideox_sat.sampling.adapters import adapter_bytes, added_up, fitting
from cogvideox_sat.sampling.open_sessions import sessions_of_process
from cogvideox_sat.sampling.requests import SessionSettings
from cogvideox_sat.sampling.session import SamplingSession
from diffusion_video import SATVideoDiffusionEngine
from lora_adapters import random_adapter, with_lora
from sample_video import main
from sgm.errors import UserError
from support import needs_compiler
from tools.export_sat_lora_weight import main as export
from tools.merge_lora import main as merge

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

FEW = {"size": (32, 48), "frames": 9, "steps": 2, "seed": 1}


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory) -> tuple[Path, Path]:
    """Return a checkpoint of a run with alpha 6 and rank 3, and a file of diffusers of rank 5."""
    folder = tmp_path_factory.mktemp("adapters")
    network = load_configs([tiny.config("5b")])["model"]["network_config"]
    width, layers = network["params"]["hidden_size"], network["params"]["num_layers"]
    for name, rank, alpha in (("run", 3, 6.0), ("other", 5, 2.0)):
        random_adapter(folder / name, width, layers, rank)
        shrink(folder / name)
        content = {
            "args": {"load": str(tiny.folder / "5b")},
            "model": {"network_config": with_lora(network, rank, alpha)},
        }
        (folder / name / "training_config.yaml").write_text(yaml.safe_dump(content))
    given = ["--sat_pt_path", folder / "other", "--lora_save_directory", folder / "diffusers"]
    assert export([str(word) for word in given]) == 0
    shutil.rmtree(folder / "other")
    return folder / "run", folder / "diffusers"


def shrink(folder: Path) -> None:
    """Let the random matrices of an adapter be of the size of trained ones."""
    file = next(folder.rglob("*.pt"))
    content = torch.load(file)
    torch.save({"module": {name: tensor / 8 for name, tensor in content["module"].items()}}, file)


def weighted(adapters, *weights: float) -> dict[str, float]:
    return {str(path): weight for path, weight in zip(adapters, weights, strict=False)}


@pytest.fixture(scope="module")
def merged(tiny, adapters, tmp_path_factory) -> Path:
    """Return the checkpoint with 0.8 of one and -0.5 of the other."""
    folder = tmp_path_factory.mktemp("merged") / "both"
    chosen = [f"{adapters[0]}:0.8", f"{adapters[1]}:-0.5"]
    assert merge(["--load", str(tiny.folder / "5b"), "--lora", *chosen, "--output", str(folder)]) == 0
    return folder


def test_two_at_once_are_the_merged_checkpoint(tiny, adapters, merged):
    """Adapters are exchanged without reading the network; strength 0 equals the base."""
    with cv.load(tiny.config("5b"), load=merged) as pipe:
        expected = pipe("a boat", **FEW).latents
    with cv.load(tiny.config("5b")) as pipe:
        base = pipe("a boat", **FEW).latents
    with cv.load(tiny.config("5b"), lora=weighted(adapters, 0.8, -0.5)) as pipe, pytest.MonkeyPatch.context() as patch:
        patch.setattr(SATVideoDiffusionEngine, "_build_network", None)
        found = pipe("a boat", **FEW).latents
        assert (found - expected).abs().max() < 1e-4 < 0.01 < (base - expected).abs().max()
        assert list(pipe.lora.values()) == [0.8, -0.5]
        for none in ({}, weighted(adapters, 0, 0)):
            pipe.set_lora(none)
            assert torch.equal(pipe("a boat", **FEW).latents, base)
        pipe.set_lora(weighted(adapters, 0.8, -0.5))
        assert torch.equal(pipe("a boat", **FEW).latents, found)
        pipe.set_lora(adapters[0])
        assert not torch.allclose(pipe("a boat", **FEW).latents, base, atol=0.01)


@pytest.mark.parametrize("offload", ["stage", "sequential"])
def test_they_go_with_offloading(tiny, adapters, merged, offload):
    with cv.load(tiny.config("5b"), load=merged) as pipe:
        expected = pipe("a boat", **FEW).latents
    with cv.load(tiny.config("5b"), offload=offload, lora=weighted(adapters, 1.0)) as pipe:
        first = pipe("a boat", **FEW).latents
        pipe.set_lora(weighted(adapters, 0.8, -0.5))
        assert (pipe("a boat", **FEW).latents - expected).abs().max() < 1e-4
        pipe.set_lora(weighted(adapters, 1.0))
        assert torch.equal(pipe("a boat", **FEW).latents, first)


@needs_compiler
def test_they_go_with_a_compiler(tiny, adapters, merged):
    with cv.load(tiny.config("5b"), load=merged) as pipe:
        expected = pipe("a boat", **FEW).latents
    keys = {"model.compile_model": True}
    with cv.load(tiny.config("5b"), set=keys, lora=weighted(adapters, 0.8, -0.5)) as pipe:
        assert (pipe("a boat", **FEW).latents - expected).abs().max() < 1e-4
        assert pipe.session.engine.compiled
        pipe.set_lora({})
        plain = pipe("a boat", **FEW).latents
    with cv.load(tiny.config("5b")) as pipe:
        assert (pipe("a boat", **FEW).latents - plain).abs().max() < 1e-4


def test_the_command_takes_them_and_repeats_them(tiny, adapters, tmp_path):
    """The record has each adapter with strength and hash; the run's twin may be given too."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a boat\n")
    given = ["--base", tiny.config("5b"), "--input_file", prompts, "--output_dir", tmp_path / "out", "--seed", "1"]
    given += ["--sampling_num_steps", "2", "--sampling_image_size", "32", "48", "--sampling_num_frames", "3"]
    given += ["--lora", f"{adapters[0]}:0.8", f"{adapters[1]}:-0.5"]
    assert main([str(word) for word in given]) == 0
    (video,) = (tmp_path / "out").rglob("*.mp4")
    record = json.loads(video.with_suffix(".json").read_text())
    assert [(each["path"], each["scale"]) for each in record["adapters"]] == [
        (str(adapters[0]), 0.8),
        (str(adapters[1]), -0.5),
    ]
    assert all(each["hash"].startswith("sha256:") for each in record["adapters"])
    again = ["--input_file", str(video.with_suffix(".json")), "--output_dir", str(tmp_path / "again")]
    assert main(again) == 0
    assert next((tmp_path / "again").rglob("*.mp4")).read_bytes() == video.read_bytes()
    with cv.load(tiny.config("5b"), lora=weighted(adapters, 0.8, -0.5)) as pipe:
        assert pipe("a boat", **FEW).save(tmp_path / "a.mp4").read_bytes() == video.read_bytes()


def test_one_alone_is_what_lora_load_makes_of_it(tiny, adapters, tmp_path):
    """To the bit; a run's folder is its base with its adapter."""
    twin = tmp_path / "twin.yaml"
    network = with_lora({"params": {"modules": {}}}, 3, 6.0)
    twin.write_text(yaml.safe_dump({"include": str(tiny.config("5b")), "model": {"network_config": network}}))
    with cv.load(twin, lora_load=adapters[0], lora_scale=0.8) as pipe:
        expected = pipe("a boat", **FEW).latents
        with pytest.raises(UserError, match="lora: the model was loaded with a lora_config"):
            pipe.set_lora({})
    with cv.load(twin, lora=weighted(adapters, 0.8)) as pipe:
        assert torch.equal(pipe("a boat", **FEW).latents, expected)
    run = tmp_path / "run"
    shutil.copytree(adapters[0], run)
    config = load_configs([twin])
    config["args"] = {"load": str(tiny.folder / "5b")}
    (run / "training_config.yaml").write_text(yaml.safe_dump(config))
    with cv.load(run) as pipe:
        assert pipe.lora == {str(run): 1.0}
        pipe.set_lora({run: 0.8})
        assert torch.equal(pipe("a boat", **FEW).latents, expected)


def test_what_is_wrong_with_one_is_a_line(tiny, adapters, tmp_path, caplog):
    narrow = tmp_path / "narrow"
    random_adapter(narrow, 8, 1, 2)
    for lora, says in (
        ({"nowhere": 1}, "lora: nowhere does not exist"),
        ({narrow: 1}, "lora: .* is for a network of width 8, but this one has"),
        ({adapters[0]: "much"}, "lora: the strength of .*: got 'much'; give a number"),
        ({adapters[0]: float("nan")}, "lora: the strength of .*: got nan"),
        (5, "lora: got 5; give paths with their strengths"),
        ([{}], r"lora: got \[\{\}\]; give paths"),
        (tiny.folder / "5b", "holds no adapter"),
    ):
        with pytest.raises(UserError, match=says):
            cv.load(tiny.config("5b"), lora=lora)
    with pytest.raises(UserError, match="lora: lora_load is given too"):
        cv.load(tiny.config("5b"), lora=adapters[0], lora_load=str(adapters[0]))
    given = ["--base", str(tiny.config("5b")), "--lora", f"{adapters[0]}:much"]
    assert main(given) == 2 and "'much' is not a number; write PATH:0.8" in caplog.text


def test_what_they_take_is_left_of_the_memory_to_stay_within(tiny, adapters, monkeypatch):
    asked = []

    def choose(memory, policies, budget, fit):
        asked.append(budget)
        return MemoryPolicy("none", 2), ""

    monkeypatch.setattr(fitting_module, "choose", choose)
    monkeypatch.setattr(fitting_module, "with_policy", lambda args, policy, left: args)
    given = ["--base", str(tiny.config("5b")), "--fit", "8GB", "--sampling_image_size", "32", "48"]
    given += ["--sampling_num_frames", "3"]
    sessions_of_process.enter(1)
    for lora in ([], ["--lora", str(adapters[0])]):
        fitting_module.fitted(get_args([*given, *lora], complete=False), None)
    sessions_of_process.leave()
    assert asked[0] - asked[1] == adapter_bytes([(read_adapter(adapters[0]), 1.0)]) > 0


def test_a_session_of_a_program_takes_them_where_the_network_has_none_of_its_own(tiny, adapters):
    config = load_configs([tiny.config("5b")])
    plain = SessionSettings(config["model"], load=config["args"]["load"], adapters=((adapters[0], 1.0),))
    with SamplingSession(plain) as session:
        assert len(session.adapters) == 1
    network = with_lora(config["model"]["network_config"], 3, 6.0)
    with pytest.raises(UserError, match="lora: the model was loaded with a lora_config"):
        SamplingSession(replace(plain, model_config={**config["model"], "network_config": network}))
    assert sessions_of_process.count == 0


def test_layers_beyond_the_network_are_refused(tiny, tmp_path):
    section = load_configs([tiny.config("5b")])["model"]
    params = section["network_config"]["params"]
    random_adapter(tmp_path / "deep", params["hidden_size"], params["num_layers"] + 2, 2)
    adapter = read_adapter(tmp_path / "deep")
    with pytest.raises(UserError, match=f"adapts layer {params['num_layers'] + 1}, but this network has layers 0 to"):
        fitting(adapter, section)
    assert adapter_bytes([(adapter, 1.0)]) == sum(matrix.nbytes for matrix in adapter.matrices.values())
    assert added_up([(adapter, 0.0)]) == {} and len(added_up([(adapter, 1.0)])) == 2 * (params["num_layers"] + 2)
