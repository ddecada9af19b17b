"""A user's engine is used in sampling, training and encoding, from Python and YAML."""

import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import processes
from arguments import get_args
from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.configuration.training_arguments import get_training_args
from cogvideox_sat.engine_choice import build_engine, engine_class
from diffusion_video import SATVideoDiffusionEngine
from sample_video import main, sampling_main
from sgm.errors import UserError
from train_video import training_main
from training_clips import write_dataset
from training_runs import metrics, runs_of, train, write_config
from videos import read_video

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


class White(SATVideoDiffusionEngine):
    """Decodes everything to white, and finds every loss four times as large."""

    def __init__(self, args, **kwargs):
        super().__init__(args, **kwargs)

    def decode_first_stage(self, z):
        return torch.ones_like(super().decode_first_stage(z))

    def shared_step(self, batch, drop=True):
        loss, log = super().shared_step(batch, drop)
        return 4 * loss, log


class Deaf(SATVideoDiffusionEngine):
    """Does not hand its keywords on."""

    def __init__(self, args, **kwargs):
        super().__init__(args, parts=())


class Narrow(SATVideoDiffusionEngine):
    def __init__(self, args):
        super().__init__(args)


class Encoder(SATVideoDiffusionEngine):
    def encode_first_stage(self, x, batch=None):
        return super().encode_first_stage(x, batch)


def command(tiny, folder: Path, config: Path | None = None) -> list[str]:
    (folder / "p.txt").write_text("a paper boat\n")
    base = ["--base", str(config or tiny.config("5b")), "--input_file", str(folder / "p.txt")]
    size = ["--sampling_num_steps", "2", "--sampling_image_size", "64", "96", "--sampling_num_frames", "1"]
    return [*base, *size, "--output_dir", str(folder / "videos")]


def is_white(folder: Path) -> bool:
    (video,) = (folder / "videos").rglob("*.mp4")
    return float(read_video(video)[1].min()) > 0.95


@pytest.mark.slow
def test_sampling_from_python(tiny, tmp_path):
    """Sampling works as in the original's scripts, with a changed OmegaConf Namespace."""
    args = Namespace(**vars(get_args(command(tiny, tmp_path))), comment="anything")
    del args.deepspeed_config
    args.model_config = OmegaConf.create(args.model_config)
    args.model_config.first_stage_config.params.cp_size = 1
    args.model_config.loss_fn_config.params.sigma_sampler_config.params.uniform_sampling = False
    assert sampling_main(args, model_cls=White) == 0
    assert is_white(tmp_path)
    args.overwrite = True
    assert sampling_main(args, SATVideoDiffusionEngine) == 0
    assert not is_white(tmp_path)


@pytest.mark.slow
def test_sampling_by_configuration(tiny, tmp_path):
    config = tiny.variant("5b", tmp_path / "5b.yaml", model={"target": f"{__name__}.White"})
    assert main(command(tiny, tmp_path, config)) == 0
    assert is_white(tmp_path)


@pytest.mark.slow
def test_training(tiny, tmp_path):
    clips = write_dataset(tmp_path / "data", clips=2, frames=12, sizes=[(64, 96)])

    def config(name: str, **sections) -> Path:
        save = str(tmp_path / name)
        return write_config(
            tmp_path / f"{name}.yaml", tiny, "5b", clips, lora=True, train_iters=1, save=save, **sections
        )

    plain = metrics(train(config("plain")))
    by_name = metrics(train(config("named", model={"target": f"{__name__}.White"})))
    args = get_training_args(["--base", str(config("python"))])
    args = Namespace(**{**vars(args), "model_config": OmegaConf.create(args.model_config), "merged_config": {}})
    assert training_main(args, model_cls=White) == 0
    saved = yaml.safe_load((runs_of(tmp_path / "python.yaml")[-1] / "training_config.yaml").read_text())
    assert saved["args"]["load"] and saved["deepspeed"]["optimizer"] and saved["model"]["network_config"]
    by_class = metrics(runs_of(tmp_path / "python.yaml")[-1])
    assert by_name == by_class == pytest.approx({step: 4 * loss for step, loss in plain.items()}, rel=1e-5)


def test_a_cache_knows_no_other_way_of_encoding(tiny, tmp_path, caplog):
    from tools.precompute_latents import main as precompute

    clips = write_dataset(tmp_path / "data", clips=1, frames=12, sizes=[(64, 96)])
    config = write_config(tmp_path / "c.yaml", tiny, "5b", clips, model={"target": f"{__name__}.Encoder"})
    assert precompute(["--base", str(config), "--output", str(tmp_path / "latents")]) == 2
    assert "encodes clips in its own way" in caplog.text


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (Narrow, r"model_cls: its __init__ must take \(args, \*\*kwargs\)"),
        (torch.nn.Identity, "model_cls: Identity is not a subclass of diffusion_video.SATVideoDiffusionEngine"),
        (7, "model_cls: 7 is not a subclass"),
    ],
)
def test_what_is_no_engine(chosen, says):
    with pytest.raises(UserError, match=says):
        engine_class(EngineSettings({}, model_cls=chosen))


@pytest.mark.parametrize(
    ("target", "says"),
    [("torch.nn.Identity", "model.target: torch.nn.Identity: Identity is no"), (7, "model.target: got 7")],
)
def test_a_target_that_is_no_engine(target, says):
    with pytest.raises(UserError, match=says):
        engine_class(EngineSettings({"target": target}))


def test_an_engine_that_keeps_its_keywords_to_itself(tiny):
    section = get_args(["--base", str(tiny.config("5b")), "--input_file", "p"]).model_config
    settings = EngineSettings(section, model_cls=Deaf)
    with pytest.raises(UserError, match="must pass its keywords on"):
        build_engine(settings, (), torch.device("meta"))


@pytest.mark.slow
def test_a_module_in_the_current_directory(tiny, tmp_path):
    """The command finds the module; a missing one is reported before PyTorch's import."""
    (tmp_path / "my_engine.py").write_text(
        textwrap.dedent("""
            from diffusion_video import SATVideoDiffusionEngine

            class Mine(SATVideoDiffusionEngine):
                def __init__(self, args, **kwargs):
                    raise SystemExit(9)
        """)
    )
    for target, code in (("my_engine.Mine", 9), ("my_engine.Yours", 2), ("your_engine.Mine", 2)):
        config = tiny.variant("5b", tmp_path / "5b.yaml", model={"target": target})
        words = [ROOT / "sat" / "sample_video.py", *command(tiny, tmp_path, config)]
        if code == 2:
            result = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path, timeout=90)
        else:
            result = processes.run(words, cwd=tmp_path, timeout=90)
        assert result.returncode == code, result.stderr
        if code == 2:
            assert f"model.target: {target}" in result.stderr and result.stderr.count("\n") == 1
