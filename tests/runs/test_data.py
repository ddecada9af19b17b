"""The data of a run: each process's share, the resume position, and errors that end it."""

import logging
from itertools import islice
from pathlib import Path

import pytest

from cogvideox_sat.clips.reader_record import KEY
from cogvideox_sat.configuration.argument_lists import VaeTrainingArguments
from cogvideox_sat.configuration.settings import DataSettings
from cogvideox_sat.parallel.agreement import join_processes, leave_processes
from cogvideox_sat.runs.data import StepShare, open_training_data, open_validation_data
from cogvideox_sat.runs.vae_data import vae_data_settings
from sgm.errors import UserError
from training_clips import write_dataset

LOG = logging.getLogger(__name__)
PARAMS = {"video_size": [64, 96], "fps": 8, "max_num_frames": 9, "skip_frms_num": 0}
CONFIG = {"target": "data_video.SFTDataset", "params": PARAMS}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("clips") / "data", clips=8, frames=12, sizes=[(64, 96)])


@pytest.fixture(autouse=True)
def one_process():
    join_processes()
    yield
    leave_processes()


def settings(clips: Path, **changes) -> DataSettings:
    return DataSettings(CONFIG, train_data=[str(clips)], valid_data=[str(clips)], num_workers=0, **changes)


def batches(folder: Path, found: DataSettings, share: StepShare, count: int, state=None) -> list[list[tuple[int, int]]]:
    """Return index and seed of the samples of the next batches."""
    data = open_training_data(folder, found, share, 10, state, LOG)
    return [list(zip(batch["index"], batch["seed"], strict=True)) for batch in islice(data.loader, count)]


def test_processes_share_an_epoch(clips, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    shares = [StepShare(2, 2, rank, 2) for rank in range(2)]
    assert shares[0].clips == 8
    own = [batches(tmp_path, settings(clips), share, 2) for share in shares]
    assert sorted(index for batch in (*own[0], *own[1]) for index, _ in batch) == list(range(8))
    assert "train_data: 8 clips, 10.0 passes over them: 8 of 9 frames of 64x96" in caplog.text


def test_a_run_goes_on_where_its_checkpoint_was(clips, tmp_path, caplog):
    share = StepShare(2, 1, 0, 1)
    whole = batches(tmp_path, settings(clips), share, 6)
    data = open_training_data(tmp_path, settings(clips), share, 10, None, LOG)
    state = {"step": 3, "data": data.order.state(3), KEY: {"video_backend": "decord"}}
    assert batches(tmp_path, settings(clips), share, 3, state) == whole[3:]
    assert "videos were read with decord and are now read with pyav" in caplog.text
    assert batches(tmp_path, settings(clips, seed=5), share, 6) != whole


def test_unreadable_clips_are_listed_before_they_end_the_run(clips, tmp_path):
    data = write_dataset(tmp_path / "data", clips=3, frames=12, sizes=[(64, 96)])
    (data / "videos" / "001.mp4").write_bytes(b"no video")
    share = StepShare(1, 1, 0, 1)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"1 of 3 clips are unreadable, more than max_unreadable_share 0\.1 allows"):
        open_training_data(tmp_path / "run", settings(data), share, 10, None, LOG)
    assert "001.mp4" in (tmp_path / "run" / "unreadable-0000.txt").read_text()
    found = open_training_data(tmp_path / "run", settings(data, max_unreadable_share=0.5), share, 10, None, LOG)
    assert len(found.dataset) == 2


def test_validation_sees_the_same_every_time(clips, tmp_path):
    data = open_validation_data(tmp_path, settings(clips, eval_iters=2, eval_batch_size=2), StepShare(1, 1, 0, 1))
    first, second = ([(batch["index"], batch["mp4"]) for batch, _ in data.loader] for _ in range(2))
    assert [index for index, _ in first] == [index for index, _ in second] == [[0, 1], [2, 3]]
    assert all((one == other).all() for (_, one), (_, other) in zip(first, second, strict=True))
    assert not data.dataset.random_start


def test_a_vae_takes_clips_without_captions_in_lengths_of_its_own(clips, tmp_path):
    args = VaeTrainingArguments(
        train_data=[str(clips)], data_config=CONFIG, model_config={"target": "a.VAE"}, clip_timeout=7.0, seed=3
    )
    found = vae_data_settings(args, time_factor=8)
    assert (found.missing_label, found.model_config, found.clip_timeout, found.seed) == ("ignore", None, 7.0, 3)
    data = open_training_data(tmp_path, found, StepShare(1, 1, 0, 1), 10, None, LOG)
    assert data.dataset.sampling.multiple == 8
    assert "frame_multiple" not in CONFIG["params"]
