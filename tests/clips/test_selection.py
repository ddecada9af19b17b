"""Test that usable clips become samples, and all other files are counted with a reason."""

import itertools
import logging
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from cogvideox_sat.clips.batch_order import SampleKey
from cogvideox_sat.latent_geometry import Bucket
from data_video import SFTDataset, VideoDataset
from sgm.errors import UserError
from training_clips import clip_number, frame_numbers, write_clip, write_dataset, write_tar

SETTINGS = {"video_size": [64, 96], "fps": 8, "max_num_frames": 9, "skip_frms_num": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write three clips of 17 frames with captions."""
    return write_dataset(tmp_path_factory.mktemp("data") / "set", clips=3)


def linked(folder: Path, target: Path, *, labels: bool = True) -> Path:
    """Link the data set at another place, to add to."""
    (target / "videos").mkdir(parents=True)
    for file in (folder / "videos").iterdir():
        (target / "videos" / file.name).symlink_to(file)
    if labels:
        (target / "labels").mkdir()
        for file in (folder / "labels").iterdir():
            (target / "labels" / file.name).write_text(file.read_text())
    return target


def picture(path: Path, size: tuple[int, int] = (96, 64), colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


# ---------------------------------------------------------------- videos and pictures


def test_a_video_never_trains_as_a_picture_unless_asked_for(folder, tmp_path, caplog):
    place = linked(folder, tmp_path / "set")
    for name, frames in {"short": 5, "single": 1, "enough": 11}.items():
        write_clip(place / "videos" / f"{name}.mp4", frames)
        (place / "labels" / f"{name}.txt").write_text(name)
    settings = {**SETTINGS, "skip_frms_num": 3}
    with caplog.at_level(logging.WARNING):
        dataset = SFTDataset(place, **settings)
    assert [dataset[i]["txt"] for i in range(4)] == ["clip 0", "clip 1", "clip 2", "enough"]
    assert {bucket.frames for bucket in dataset.buckets} == {9, 5}
    assert "left out: 2 videos are shorter than 0.5 s without 3 frames at each end" in caplog.text
    assert not dataset.unreadable
    assert len(SFTDataset(place, **settings, min_frames=1)) == 6
    assert len(SFTDataset(place, **{**settings, "max_num_frames": 1})) == 6
    assert [b.frames for b in SFTDataset(place, **settings, min_frames=6).buckets] == [9, 9, 9]
    with pytest.raises(UserError, match=r"no clip is left: 6 videos are shorter than 1\.5 s .*; give longer videos"):
        SFTDataset(place, **{**settings, "max_num_frames": 17}, min_frames=13)
    with pytest.raises(UserError, match="min_frames is 10, more than max_num_frames 9"):
        SFTDataset(place, **settings, min_frames=10)


def test_pictures_beside_videos_need_captions_of_their_own(folder, tmp_path, caplog):
    place = linked(folder, tmp_path / "set")
    for name in ("images/000.png", "first_frames/001.png", "videos/002.png", "other/masks/a.png"):
        picture(place / name)
    picture(place / "images" / "own.png")
    (place / "images" / "own.txt").write_text("a picture")
    with caplog.at_level(logging.WARNING):
        dataset = SFTDataset(place, **SETTINGS)
    assert [dataset[i]["txt"] for i in range(len(dataset))] == ["a picture", "clip 0", "clip 1", "clip 2"]
    assert "left out: 4 pictures beside videos have no caption of their own" in caplog.text
    assert len(SFTDataset(place, **SETTINGS, missing_label="empty")) == 4
    assert len(SFTDataset(place, **SETTINGS, missing_label="ignore")) == 8  # a VAE, which needs no captions


def test_pictures_alone_are_a_data_set(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    assert len(SFTDataset(tmp_path, **SETTINGS)) == 3


@pytest.mark.slow
def test_pictures_that_move_train_as_videos(tmp_path):
    frames = [Image.new("RGB", (96, 64), (20 * i, 0, 0)) for i in range(12)]
    for kind in ("gif", "webp"):
        frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], duration=125)
        (tmp_path / f"a.{kind}").rename(tmp_path / f"{kind}.{kind}")
        (tmp_path / f"{kind}.txt").write_text(kind)
    dataset = SFTDataset(tmp_path, **SETTINGS)
    assert [bucket.frames for bucket in dataset.buckets] == [9, 9]
    assert dataset[0]["mp4"].shape == (9, 3, 64, 96)


# ---------------------------------------------------------------- captions


@pytest.mark.slow
def test_without_any_caption_the_run_stops_and_says_what_it_looked_for(folder, tmp_path):
    place = linked(folder, tmp_path / "set", labels=False)
    (place / "prompts.txt").write_text("a\nb\nc\n")
    with pytest.raises(UserError) as error:
        SFTDataset([folder, place], **SETTINGS)
    message = str(error.value)
    assert message.startswith(f"{place}: none of 3 clips has a caption; looked for labels/NAME.txt")
    assert "prompts.txt needs a videos.txt beside it" in message and "missing_label: empty" in message
    assert SFTDataset(place, **SETTINGS, missing_label="empty").missing_labels == 3
    (place / "videos.txt").write_text("000.mp4\n001.mp4\n002.mp4\n")
    dataset = SFTDataset(place, **SETTINGS)
    assert [(dataset[i]["txt"], clip_number(dataset[i]["mp4"])) for i in range(3)] == [("a", 0), ("b", 1), ("c", 2)]


@pytest.mark.parametrize("kind", ["tar", "csv", "jsonl"])
def test_shards_and_manifests_stop_without_captions_too(folder, tmp_path, kind):
    video = folder / "videos" / "000.mp4"
    place = tmp_path / f"set.{kind}"
    if kind == "tar":
        write_tar(place, {"a.mp4": video.read_bytes()})
    else:
        place.write_text(f"video\n{video}\n" if kind == "csv" else f'{{"video": "{video}"}}')
    with pytest.raises(UserError, match=r"none of 1 clips has a caption; looked for (members|a column)"):
        SFTDataset(place, **SETTINGS)
    assert len(SFTDataset(place, **SETTINGS, missing_label="empty")) == 1


def test_lines_of_labels_and_a_prefix(folder, tmp_path, caplog):
    place = linked(folder, tmp_path / "set")
    (place / "labels" / "001.txt").write_text("one\ntwo\n")
    (place / "labels" / "002.txt").unlink()
    with caplog.at_level(logging.WARNING):
        dataset = SFTDataset(place, **SETTINGS, caption_prefix="SPIRAL style, ")
    assert [dataset[i]["txt"] for i in range(3)] == ["SPIRAL style, clip 0", "SPIRAL style, one", "SPIRAL style,"]
    assert caplog.text.count("1 label has several lines; the first is used") == 1
    assert SFTDataset(place, **SETTINGS, label_lines="all")[1]["txt"] == "one two"


# ---------------------------------------------------------------- several clips of a video


@pytest.fixture(scope="module")
def long_video(tmp_path_factory) -> Path:
    """Write a manifest of a video of 90 frames, and of one of 10."""
    folder = tmp_path_factory.mktemp("long")
    write_clip(folder / "long.mp4", 90, clip_number=1)
    write_clip(folder / "short.mp4", 10, clip_number=2)
    path = folder / "set.csv"
    path.write_text("video,caption\nlong.mp4,long\nshort.mp4,short\n")
    return path


def starts(dataset: SFTDataset, index: int, seeds: int = 30) -> set[int]:
    return {frame_numbers(dataset[SampleKey(index, seed)]["mp4"])[0] for seed in range(seeds)}


@pytest.mark.slow
def test_clips_of_a_video_start_each_in_a_part_of_its_own(long_video):
    dataset = SFTDataset(long_video, **SETTINGS, clips_per_video=3)
    assert [dataset[i]["txt"] for i in range(len(dataset))] == ["long", "long", "long", "short"]
    found = [starts(dataset, index) for index in range(3)]
    assert all(max(one) < min(other) for one, other in itertools.pairwise(found))
    assert min(found[0]) <= 4 and max(found[2]) >= 77 and all(len(each) > 8 for each in found)
    dataset.random_start = False
    assert [frame_numbers(dataset[i]["mp4"])[0] for i in range(4)] == [0, 27, 54, 0]
    assert len(SFTDataset(long_video, **SETTINGS, clips_per_video=100)) == 10 + 1  # separate windows


@pytest.mark.slow
def test_a_clip_every_so_many_seconds(long_video):
    dataset = SFTDataset(long_video, **SETTINGS, clip_stride=2, random_start=False)
    assert [frame_numbers(dataset[i]["mp4"])[0] for i in range(len(dataset))] == [0, 16, 32, 48, 64, 80, 0]
    dataset.random_start = True
    assert starts(dataset, 1, 100) == set(range(16, 32))
    assert starts(dataset, 5) == {80, 81}
    assert len(SFTDataset(long_video, **SETTINGS, clip_stride=2, clips_per_video=2)) == 3


def test_without_the_options_samples_are_those_of_before(long_video):
    plain = SFTDataset(long_video, **SETTINGS)
    one = SFTDataset(long_video, **SETTINGS, clips_per_video=1, caption_prefix="", reshape_mode="center")
    assert not one.parts and plain.draws is None
    for seed in range(5):
        assert torch.equal(plain[SampleKey(0, seed)]["mp4"], one[SampleKey(0, seed)]["mp4"])


def test_for_a_damaged_video_no_other_part_of_it_is_tried(tmp_path, long_video):
    (tmp_path / "long.mp4").write_bytes((long_video.parent / "long.mp4").read_bytes())
    (tmp_path / "set.csv").write_text(f"video,caption\nlong.mp4,long\n{long_video.parent / 'long.mp4'},whole\n")
    dataset = SFTDataset(tmp_path / "set.csv", **SETTINGS, clips_per_video=4)
    (tmp_path / "long.mp4").write_bytes(b"")
    sample = dataset[SampleKey(0, 1)]
    assert sample["txt"] == "whole" and len(sample["unreadable"]) == 1


# ---------------------------------------------------------------- crops


def test_crops_are_told_with_a_warning_when_much_is_lost(folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        SFTDataset(folder, **SETTINGS)
    assert "crops cut away" not in caplog.text
    with caplog.at_level(logging.INFO):
        SFTDataset(folder, **{**SETTINGS, "video_size": [64, 80]})
    assert "crops cut away 17% of the picture on average, 17% at most" in caplog.text
    assert "lose more than a third" not in caplog.text
    SFTDataset(folder, **{**SETTINGS, "video_size": [96, 64]})
    assert re.search("crops cut away 56% .*; 3 of 3 lose more than a third: add a size", caplog.text)


def test_crops_and_mirrors_follow_from_the_seed(tmp_path, caplog):
    gradient = torch.arange(96).expand(64, 96)
    Image.fromarray(gradient.to(torch.uint8).numpy()).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "set.csv").write_text("video,caption\na.png,a ball moving left\n")
    settings = {**SETTINGS, "video_size": [64, 64]}

    def edges(**options) -> list[tuple[int, int]]:
        dataset = SFTDataset(tmp_path / "set.csv", **settings, **options)
        clips = [dataset[SampleKey(0, seed)]["mp4"][0, 0, 0] for seed in range(40)]
        return [(int(clip[0]), int(clip[-1])) for clip in clips]

    assert set(edges()) == {(16, 79)}
    crops = edges(reshape_mode="random")
    assert len(set(crops)) > 15 and {right - left for left, right in crops} == {63}
    assert edges(reshape_mode="none") == crops == edges(reshape_mode="random")
    assert set(edges(horizontal_flip=0.5)) == {(16, 79), (79, 16)}
    assert "1 caption says left or right" in caplog.text


def test_videos_are_cropped_and_mirrored_alike_in_all_frames(folder):
    settings = {**SETTINGS, "video_size": [64, 64]}
    random, plain = (
        SFTDataset(folder, **settings, reshape_mode="random", horizontal_flip=1),
        SFTDataset(folder, **settings),
    )
    whole = SFTDataset(folder, **SETTINGS)
    places = set()
    for seed in range(6):
        key = SampleKey(0, seed)
        clip, source = random[key]["mp4"].flip(-1), whole[key]["mp4"]
        (left,) = [i for i in range(33) if torch.equal(source[..., i : i + 64], clip)][:1] or [None]
        places.add(left)
        assert torch.equal(plain[key]["mp4"], source[..., 16:80])
    assert None not in places and len(places) > 2


# ---------------------------------------------------------------- the original's names


def test_the_originals_keywords(folder, tmp_path, caplog):
    videos = [(folder / "videos" / f"00{i}.mp4").read_bytes() for i in range(3)]
    for name, video in zip(("a", "deep/b", "deep/er/c"), videos, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(tmp_path / f"{name}.tar", {"x.mp4": video, "x.json": b'{"short": "' + name.encode() + b'"}'})
    with caplog.at_level(logging.INFO):
        dataset = VideoDataset(
            str(tmp_path / "a.tar"),
            [64, 96],
            9,
            8,
            0.0,
            5,
            1,
            ["short"],
            10,
            f"{tmp_path}/deep/er*2,{tmp_path}/deep",
            "short",
        )
    assert "nshards, seed, meta_names have no effect" in caplog.text
    assert [dataset[i]["txt"] for i in range(5)] == ["a", "deep/er/c", "deep/er/c", "deep/b", "deep/er/c"]
    assert dataset.locality.window == 10
    assert dataset.buckets == [Bucket(9, 64, 96)] * 5
    (tmp_path / "deep" / "broken.tar").symlink_to("gone.tar")
    (tmp_path / "deep" / "folder.tar").mkdir()
    (tmp_path / "deep" / "._b.tar").write_text("notes of macOS")
    only = VideoDataset("", image_size=[64, 96], include_dirs=str(tmp_path / "deep"), txt_key="short")
    assert len(only) == 2
    for include_dirs, message in (
        ("/nowhere", "holds no .tar"),
        (f"{tmp_path}*x", "write FOLDER"),
        (3, "include_dirs: got 3"),
    ):
        with pytest.raises(UserError, match=message):
            VideoDataset("", [64, 96], include_dirs=include_dirs)
