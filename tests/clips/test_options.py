"""Test that training with options of data sets is the same on any number of workers.

It is the same to the bit after a resume.
"""

from pathlib import Path

import pytest
import yaml

from conftest import TinyModels
from training_clips import write_clip, write_dataset
from training_runs import metrics, train, write_config

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture
def config(tiny: TinyModels, tmp_path: Path) -> Path:
    """Return a configuration of two places with weights, and random crops and mirroring."""
    few, many = write_dataset(tmp_path / "few", clips=1), write_dataset(tmp_path / "many", clips=1)
    write_clip(many / "videos" / "long.mp4", 60)
    (many / "labels" / "long.txt").write_text("a long one")
    params = {"video_size": [64, 64], "clips_per_video": 2, "reshape_mode": "random", "horizontal_flip": 0.5}
    path = write_config(tmp_path / "config.yaml", tiny, "2b", few, params={**params, "caption_prefix": "shapes:"})
    content = yaml.safe_load(path.read_text())
    content["args"]["train_data"] = [{"path": str(few), "weight": 2}, {"path": str(many), "weight": 1}]
    content["args"] |= {"train_iters": 6, "lr_decay_style": "constant"}  # an epoch has four samples
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.long
def test_a_run_with_weights_goes_on_to_the_bit(config):
    whole = metrics(train(config))
    assert len(set(whole.values())) == 6
    first = train(config, "--train_iters", "5", "--num_workers", "1", "--experiment_name", "parts")
    second = train(config, "--num_workers", "2", "--resume", str(first))
    assert metrics(second) == whole
    saved = yaml.safe_load((second / "training_config.yaml").read_text())["args"]
    assert saved["train_data_weights"] == [2.0, 1.0] and all(isinstance(path, str) for path in saved["train_data"])
