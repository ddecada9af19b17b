"""The dataset of a configuration: ours, one of the user's own, and what is none."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from cogvideox_sat.configuration.settings import DataSettings
from cogvideox_sat.runs.datasets import make_dataset
from data_video import SFTDataset
from sgm.errors import UserError
from training_clips import write_dataset

SETTINGS = {"video_size": [64, 96], "fps": 8, "max_num_frames": 9, "skip_frms_num": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", clips=3, sizes=[(64, 96)])


@pytest.mark.parametrize(
    ("target", "params"),
    [
        ("data_video.SFTDataset", SETTINGS),
        ("data_video.VideoDataset", {"image_size": [64, 96], "num_frames": 9, "fps": 8, "skip_frms_num": 0.0}),
    ],
)
def test_the_dataset_of_a_configuration(folder, target, params):
    settings = DataSettings({"target": target, "params": params}, missing_label="stop", max_unreadable_share=0.0)
    dataset = make_dataset([str(folder)], settings)
    assert (len(dataset), dataset.random_start) == (3, True)
    assert not make_dataset([str(folder)], settings, random_start=False).random_start
    with pytest.raises(UserError, match="typo"):
        make_dataset([str(folder)], replace(settings, data_config={"target": target, "params": {**params, "typo": 1}}))


def test_wrong_configurations_are_named(folder):
    with pytest.raises(UserError, match="target: missing"):
        make_dataset([str(folder)], DataSettings({"params": SETTINGS}))
    with pytest.raises(UserError, match="is not a class of datasets"):
        make_dataset([str(folder)], DataSettings({"target": "torch.nn.Identity"}))


class ListOfClips(list):
    """A dataset that is written for another loader."""

    @classmethod
    def create_dataset_function(cls, path, args, **params):
        return cls(path)


def test_a_dataset_that_does_not_tell_shapes(tmp_path):
    config = {"target": f"{__name__}.ListOfClips"}
    with pytest.raises(UserError, match=r"data.target: .*ListOfClips.* derive your class from data_video.SFTDataset"):
        make_dataset([str(tmp_path)], DataSettings(config))


class Curious(SFTDataset):
    """Reads an argument of the command that ours does not know, and hands the rest on."""

    @classmethod
    def create_dataset_function(cls, path, args, **params):
        dataset = super().create_dataset_function(path, args, **params)
        dataset.seen = args.mine, args.clip_timeout
        return dataset


def test_a_class_of_the_users_own_sees_all_arguments(folder):
    config = {"target": f"{__name__}.Curious", "params": SETTINGS}
    args = Namespace(mine=7, clip_timeout=5.0, missing_label="stop", data_config=config, model_config=None)
    dataset = make_dataset([str(folder)], DataSettings.from_args(args, clip_timeout=9.0))
    assert (dataset.seen, dataset.clip_timeout, len(dataset)) == ((7, 9.0), 9.0, 3)


def test_weights_need_a_class_that_tells_its_places_apart(folder, monkeypatch):
    settings = DataSettings({"target": "data_video.SFTDataset", "params": SETTINGS})
    assert make_dataset([str(folder)] * 2, settings, weights=[3, 1]).draws == [1.5] * 3 + [0.5] * 3
    with pytest.raises(UserError, match=r"train_data_weights: data_video\.SFTDataset does not tell its places apart"):
        make_dataset([str(folder)] * 2, settings, weights=[3, 1, 2])
