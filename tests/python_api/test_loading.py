"""A model is found by its name and loaded; errors come before PyTorch's import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import cogvideox_sat as cv
import processes
from cogvideox_sat.python_api.loading import precision_of
from cogvideox_sat.python_api.model_places import PIPELINE_FILE, find_model, shipped_models
from pipelines import convert
from sgm import weights
from sgm.errors import UserError

ROOT = Path(__file__).parents[2]
FEW = {"size": (32, 48), "frames": 9, "steps": 2}
PATHS = {**os.environ, "PYTHONPATH": f"{ROOT / 'sat'}:{ROOT}", "OMP_NUM_THREADS": "1"}
TINY = str(ROOT / "configs" / "tiny" / "cogvideox_tiny.yaml")


def test_the_names_of_shipped_models():
    names = shipped_models()
    assert {"tiny", "tiny_i2v", "tiny_continue", "cogvideox_2b", "cogvideox_5b_i2v", "cogvideox1.5_5b"} <= names.keys()
    assert all(path.is_file() for path in names.values()) and not [name for name in names if "lora" in name]
    assert find_model("CogVideoX-5B").base == [names["cogvideox_5b"]]
    assert find_model(Path(TINY)).base == [Path(TINY)] and find_model([TINY, "more.yaml"]).base == [TINY, "more.yaml"]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("tinny", "model: tinny does not exist.*; did you mean tiny?"),
        ("/nowhere/at/all", "model: /nowhere/at/all does not exist; known are tiny, "),
        ("", "model: '' does not exist"),
        (3, "model: got 3; give a name, a folder, or configuration files"),
        ([], r"model: got \[\]; give a name"),
        (str(ROOT / "tests"), "tests holds neither training_config.yaml nor model_index.json"),
        (str(ROOT / "README.md"), "README.md holds neither"),
    ],
)
def test_what_is_no_model(model, says):
    assert PIPELINE_FILE == weights.PIPELINE_FILE
    with pytest.raises(UserError, match=says):
        cv.load(model)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"devise": "cpu"}, "devise: unknown argument; did you mean device?"),
        ({"device": "gpu"}, "device: got 'gpu'; it can be cpu, cuda or cuda:N"),
        ({"dtype": "int8"}, "dtype: got 'int8'; it can be float16, bfloat16 or float32"),
        ({"offload": "some"}, "offload: got 'some'; it can be none, stage, sequential"),
        ({"fit": "much"}, "fit"),
        ({"output_dir": "x"}, "output_dir: only the command takes this argument"),
        ({"set": {"model.scale_facto": 1}}, "--set model.scale_facto: model has no 'scale_facto'; did you mean"),
        ({"set": 5}, "set: got 5; give keys with their values"),
        ({"lora": TINY}, "lora: .*is damaged or not a PyTorch file"),
        ({"load": "nowhere.pt"}, "load: nowhere.pt does not exist"),
        ({"seed": "x"}, "seed: got 'x'; expected a whole number"),
        ({"frames": 5}, "frames: got 5; this model makes 1 frame"),
        ({"steps": 1001}, "steps: got 1001; this model's noise schedule has 1 to 1000 steps"),
        ({"sampler": "euler"}, "sampler is 'EulerEDMSampler', which needs a noise schedule of sigma"),
        ({"vae_tile_size": 3}, "vae_tile_size: got 3"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, says):
    with pytest.raises(UserError, match=says.replace("?", r"\?")) as caught:
        cv.load("tiny", **arguments)
    assert "\n" not in str(caught.value)


def test_dtypes_by_name_and_of_pytorch():
    both = {"fp16": False, "bf16": True}
    assert precision_of(torch.bfloat16) == precision_of("bf16") == precision_of("BFloat16") == both
    assert precision_of("float32") == {"fp16": False, "bf16": False} and precision_of(None) == {}
    assert precision_of(torch.float16) == {"fp16": True, "bf16": False}


def test_mistakes_are_told_before_pytorch_is_imported():
    code = "import sys; import cogvideox_sat as cv; assert 'sgm' not in sys.modules; dir(cv)\n"
    code += "try: cv.load('tiny', offload='some')\nexcept cv.UserError as error: print(error)\n"
    code += "print(sorted({'torch', 'deepspeed', 'transformers'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=PATHS, timeout=120)
    assert result.stdout == "offload: got 'some'; it can be none, stage, sequential\n[]\n", result.stderr


@pytest.mark.slow
def test_the_shipped_model_from_an_empty_folder(tmp_path):
    """By its name, in bfloat16, with keys that are set and arguments of the command."""
    code = "import cogvideox_sat as cv\n"
    code += "keys = {'model.sampler_config.params.num_steps': 2}\n"
    code += "with cv.load('tiny', dtype='bf16', set=keys, seed=3, attention='math', fit='40GB') as pipe:\n"
    code += "    video = pipe('a large red circle moving left')\n"
    code += "    print(pipe, video.request['steps'], video.request['seed'], pipe.args.offload, video.frames.shape)\n"
    code += "    video.save('circle.mp4', record=False)\n"
    (tmp_path / "script.py").write_text(code)
    process = processes.run([tmp_path / "script.py"], cwd=tmp_path, env=PATHS, timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "Pipeline(cogvideox_tiny, cpu, bfloat16) 2 3 none (9, 64, 64, 3)\n"
    assert (tmp_path / "circle.mp4").is_file() and "Traceback" not in process.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", ["5b", "2b"])
def test_a_pipeline_of_diffusers_is_loaded_where_it_is(tiny, tmp_path, family):
    """The pipeline's weights give the checkpoint's video; nothing is written beside them."""
    folder = convert(tiny, family, tmp_path / "pipeline")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with cv.load(folder) as pipe:
        found = pipe("a boat", seed=1, **FEW)
        kept = pipe.args.model_config["conditioner_config"]["params"]["emb_models"][0]["params"]["model_dir"]
        assert Path(kept).is_dir()
    assert not Path(kept).exists()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    guider = load_guider(tiny.config(family))
    with cv.load(tiny.config(family)) as pipe:
        expected = pipe("a boat", seed=1, **FEW, **guider)
    assert torch.allclose(found.latents, expected.latents, atol=1e-3), (found.latents - expected.latents).abs().max()


def load_guider(config: Path) -> dict:
    """Return a pipeline sampled like the released models, or with knobs like a test's model."""
    sampler = yaml.safe_load(config.read_text())["model"]["sampler_config"]
    return {"sampler": "dpmpp_2m_sde"} if not sampler["target"].endswith("VPSDEDPMPP2MSampler") else {}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_that_trained_all_weights(tiny, tmp_path):
    """The run's configuration describes the model; it may not name foreign classes."""
    run = tmp_path / "run"
    run.mkdir()
    config = yaml.safe_load(tiny.config("5b").read_text())
    (tiny.folder / "5b").joinpath("latest").exists()
    for path in (tiny.folder / "5b").iterdir():
        (run / path.name).symlink_to(path)
    config["args"] |= {"load": "the/weights/of/before", "seed": 99, "train_iters": 7, "save": "x", "resume": "latest"}
    (run / "training_config.yaml").write_text(yaml.safe_dump(config))
    with cv.load(tiny.config("5b")) as pipe:
        expected = pipe("a boat", **FEW)
    for place in (run, next(path for path in run.iterdir() if path.is_dir())):
        with cv.load(place) as pipe:
            assert pipe.args.load == str(place)
            assert torch.equal(pipe("a boat", **FEW).latents, expected.latents)
    config["model"]["sampler_config"]["target"] = "os.system"
    (run / "training_config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"os\.system"):
        cv.load(run)
