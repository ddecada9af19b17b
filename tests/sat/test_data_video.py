"""Datasets give clips of a few shapes with captions, tolerate bad files, and reproduce."""

import itertools
import logging
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from cogvideox_sat.clips.batch_order import BatchOrder, SampleKey
from cogvideox_sat.clips.probing import INDEX
from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.latent_geometry import Bucket
from data_video import SFTDataset, VideoDataset, nearest_size
from sgm.errors import UserError
from training_clips import clip_number, damage, frame_numbers, truncate, write_clip, write_dataset, write_tar

ROOT = Path(__file__).parents[2]
SIZES = [[64, 96], [96, 64]]
SETTINGS = {"video_size": [64, 96], "fps": 8, "max_num_frames": 9, "skip_frms_num": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write eight clips of 17 frames: even ones are landscape, odd ones portrait."""
    path = write_dataset(tmp_path_factory.mktemp("data") / "set", clips=8, sizes=[(64, 96), (96, 64)])
    write_clip(path / "videos" / "008.mp4", frames=7, clip_number=8)
    (path / "labels" / "008.txt").write_text("a short clip")
    return path


def copy_of(folder: Path, target: Path) -> Path:
    for file in folder.rglob("*.*"):
        if file.name != INDEX:
            (target / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (target / file.relative_to(folder)).write_bytes(file.read_bytes())
    return target


def order_of(dataset: Dataset, micro_batch_size: int = 1, **others) -> BatchOrder:
    buckets = [dataset.bucket(index) for index in range(len(dataset))]
    return BatchOrder(buckets, micro_batch_size, 0, 1, seed=0, **others)


def test_a_sample(folder):
    dataset = SFTDataset(folder, **SETTINGS)
    assert len(dataset) == 9
    sample = dataset[SampleKey(3, seed=11)]
    frames = sample.pop("mp4")
    assert frames.shape == (9, 3, 64, 96)
    assert frames.dtype == torch.uint8
    assert sample == {"txt": "clip 3", "fps": 8.0, "num_frames": 9, "index": 3, "seed": 11, "unreadable": []}
    assert torch.equal(dataset[SampleKey(3, seed=11)]["mp4"], frames)
    starts = {frame_numbers(dataset[SampleKey(2, seed=seed)]["mp4"])[0] for seed in range(20)}
    assert len(starts) > 4
    dataset.random_start = False
    assert frame_numbers(dataset[SampleKey(2, seed=11)]["mp4"]) == list(range(9))


def test_buckets_are_of_shape_and_length(folder):
    dataset = SFTDataset(folder, **{**SETTINGS, "video_size": SIZES})
    assert dataset.buckets == [Bucket(9, *SIZES[i % 2]) for i in range(8)] + [Bucket(5, 64, 96)]
    for index in range(9):
        sample = dataset[index]
        assert sample["mp4"].shape == (dataset.bucket(index)[0], 3, *dataset.bucket(index)[1:])
        assert clip_number(sample["mp4"]) == index


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((480, 640), (480, 640)),
        ((1200, 1600), (480, 640)),  # the ratio decides, not the area
        ((1920, 1080), (848, 480)),
        ((720, 1280), (480, 848)),  # 16:9, rounded
        ((719, 1280), (480, 848)),
        ((1080, 1920), (768, 1360)),  # the largest that need not be enlarged
        ((768, 1360), (768, 1360)),
        ((100, 177), (480, 848)),  # the smallest if all would be
    ],
)
def test_the_nearest_size(source, size):
    assert nearest_size(*source, [(480, 640), (480, 848), (768, 1360), (848, 480)]) == size


def test_lengths_follow_the_model(folder):
    for config, frames in (("cogvideox_2b", 13), ("cogvideox1.5_5b", 9)):
        model = load_configs([ROOT / "configs" / f"{config}.yaml"])["model"]
        args = Namespace(model_config=model, missing_label="empty", max_unreadable_share=0.1)
        params = {**SETTINGS, "max_num_frames": 49, "skip_frms_num": 2.0}
        dataset = SFTDataset.create_dataset_function(str(folder), args, **params)
        assert dataset.bucket(0).frames == frames


def test_images_and_several_places(folder, tmp_path):
    from PIL import Image

    Image.new("RGB", (96, 64), "red").save(tmp_path / "a.png")
    (tmp_path / "clips.jsonl").write_text('{"video": "a.png", "caption": "red"}')
    dataset = SFTDataset([str(folder), str(tmp_path / "clips.jsonl")], **SETTINGS)
    assert len(dataset) == 10
    sample = dataset[9]
    assert (sample["mp4"].shape, sample["txt"], sample["num_frames"]) == ((1, 3, 64, 96), "red", 1)


def test_clips_that_cannot_be_opened_are_left_out_and_counted(folder, tmp_path, caplog):
    path = copy_of(folder, tmp_path / "set")
    videos = path / "videos"
    truncate(videos / "002.mp4", videos / "002.mp4")
    (videos / "005.mp4").write_bytes(b"")
    (videos / "text.mp4").write_text("not a video")
    with caplog.at_level(logging.WARNING):
        dataset = SFTDataset(path, **SETTINGS, max_unreadable_share=0.3)
    assert len(dataset) == 7
    assert [Path(line.partition(": ")[0]).name for line in dataset.unreadable] == ["002.mp4", "005.mp4", "text.mp4"]
    assert "002.mp4: cut off" in caplog.text
    assert [dataset[index]["txt"] for index in range(7)] == [f"clip {i}" for i in (0, 1, 3, 4, 6, 7)] + ["a short clip"]
    with pytest.raises(UserError, match=r"3 of 10 clips are unreadable, more than max_unreadable_share 0.2"):
        SFTDataset(path, **SETTINGS, max_unreadable_share=0.2)


def test_for_a_damaged_clip_the_next_of_its_bucket_stands_in(folder, tmp_path):
    path = copy_of(folder, tmp_path / "set")
    for name in ("002.mp4", "004.mp4"):
        write_clip(path / "videos" / name, frames=60, fps=30)
        damage(path / "videos" / name, path / "videos" / name)
    dataset = SFTDataset(path, **{**SETTINGS, "video_size": SIZES})
    assert not dataset.unreadable
    sample = dataset[SampleKey(2, seed=7)]
    assert clip_number(sample["mp4"]) == 6
    assert torch.equal(sample["mp4"], dataset[SampleKey(6, seed=7)]["mp4"])
    assert (sample["index"], sample["seed"], sample["txt"]) == (2, 7, "clip 6")
    assert [line.split(": ") for line in sample["unreadable"]] == [
        [str(path / "videos" / name), "damaged", "its frames cannot be decoded"] for name in ("002.mp4", "004.mp4")
    ]
    for file in (path / "videos").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"no clip of 9 frames of 64x96 can be read any more: .*002\.mp4"):
        dataset[2]


def test_missing_labels(folder, tmp_path, caplog):
    path = copy_of(folder, tmp_path / "set")
    (path / "labels" / "003.txt").unlink()
    (path / "labels" / "004.txt").write_text("\n")
    with caplog.at_level(logging.WARNING):
        dataset = SFTDataset(path, **SETTINGS)
    assert dataset.missing_labels == 2
    assert "2 of 9 clips have no caption" in caplog.text
    assert [dataset[index]["txt"] for index in (2, 3, 4)] == ["clip 2", "", ""]
    with pytest.raises(UserError, match=r"2 of 9 clips have no caption, the first is .*003\.mp4"):
        SFTDataset(path, **SETTINGS, missing_label="stop")


def test_shards_give_what_the_folder_gives(folder, tmp_path):
    for number, names in enumerate((["000", "001", "002"], ["003", "004", "005", "006"])):
        members = {}
        for name in names:
            members[f"{name}.mp4"] = (folder / "videos" / f"{name}.mp4").read_bytes()
            members[f"{name}.txt"] = (folder / "labels" / f"{name}.txt").read_bytes()
        write_tar(tmp_path / f"set-{number}.tar", members)
    shards = VideoDataset(
        str(tmp_path / "set-{0..1}.tar"), image_size=[64, 96], num_frames=9, fps=8, shuffle_buffer=2, txt_key="caption"
    )
    expected = SFTDataset(folder, **SETTINGS)
    assert shards.locality == ([0, 0, 0, 1, 1, 1, 1], 2)
    assert expected.locality is None
    for index in range(7):
        key = SampleKey(index, seed=5)
        assert torch.equal(shards[key].pop("mp4"), expected[key].pop("mp4"))
        assert shards[key]["txt"] == f"clip {index}"
    assert sorted(batch[0].index for batch in itertools.islice(order_of(shards, locality=shards.locality), 7)) == [
        *range(7)
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_size": [64]}, r"video_size: got \[64\]; expected \[height, width\]"),
        ({"video_size": [[64, 96], [64, 97]]}, "multiples of 8"),
        ({"video_size": 64}, "video_size: got 64"),
        ({"video_size": []}, r"video_size: got \[\]"),
        ({"fps": 0}, "fps: got 0; expected a number"),
        ({"max_num_frames": 0}, "max_num_frames: got 0"),
        ({"max_num_frames": "many"}, "max_num_frames: got 'many'"),
        ({"skip_frms_num": -1}, "skip_frms_num: got -1"),
    ],
)
def test_wrong_settings_are_named(folder, changes, message):
    with pytest.raises(UserError, match=message):
        SFTDataset(folder, **{**SETTINGS, **changes})


def test_a_dataset_is_small_to_send_to_workers(folder):
    assert len(pickle.dumps(SFTDataset(folder, **SETTINGS))) < 3000


def test_a_tar_dataset_needs_a_size(folder):
    with pytest.raises(UserError, match="either image_size or video_size"):
        VideoDataset(str(folder))
