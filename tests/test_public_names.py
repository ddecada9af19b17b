"""Names that users' configurations and programs have keep working."""

import importlib
import inspect
from pathlib import Path

import pytest
import yaml

from cogvideox_sat.configuration.targets import iterate_targets
from sgm.util import get_obj_from_str

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SAMPLE_VIDEO = (
    *("get_batch", "get_unique_embedder_keys_from_conditioner", "read_from_cli", "read_from_file"),
    *("resize_for_rectangle_crop", "sampling_main", "save_video_as_grid_and_mp4"),
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_targets_of_shipped_configurations(config):
    for _, target in iterate_targets(yaml.safe_load(config.read_text())):
        assert inspect.isclass(get_obj_from_str(target)), target


@pytest.mark.parametrize(
    "name",
    [
        *(f"dit_video_concat.{name}" for name in ("DiffusionTransformer", "AdaLNMixin", "FinalLayerMixin")),
        *("dit_video_concat.Basic3DPositionEmbeddingMixin", "dit_video_concat.Rotary3DPositionEmbeddingMixin"),
        *("dit_video_concat.ImagePatchEmbeddingMixin", "diffusion_video.SATVideoDiffusionEngine"),
        *("data_video.SFTDataset", "data_video.VideoDataset", "arguments.get_args", "ema_adam.EmaAdam"),
        *("sgm.modules.ema.LitEma", "sgm.errors.UserError", "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper"),
        *(f"sample_video.{name}" for name in SAMPLE_VIDEO),
        "train_video.training_main",
    ],
)
def test_names_of_modules(name):
    assert callable(get_obj_from_str(name))


@pytest.mark.parametrize("command", ["sample_video", "train_video", "train_vae"])
def test_main_takes_arguments_and_returns_the_exit_code(command, capsys):
    assert importlib.import_module(command).main(["--no_such_flag"]) == 2


def test_the_data_set_takes_its_arguments_by_position(tmp_path):
    from data_video import SFTDataset
    from training_clips import write_dataset

    data = write_dataset(tmp_path / "data", clips=2, frames=9, sizes=[(32, 48)])
    dataset = SFTDataset(str(data), [32, 48], 8, 9, 0)
    assert len(dataset) == 2
    assert all(isinstance(source.caption, str) for source in dataset.sources)


@pytest.mark.parametrize("folder", ["configs/tiny", "configs/parts", "assets/tiny"])
def test_folders(folder):
    assert any((ROOT / folder).iterdir())


def test_scripts_of_users_may_prepare_clips():
    assert "prepare_clips" in (ROOT / "tools" / "run_command.sh").read_text()
