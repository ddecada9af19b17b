"""Generated datasets and prompt files can be read, and are remade only if needed."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from cogvideox_sat.media.image_inputs import load_condition_image
from cogvideox_sat.sampling.prompt_files import read_prompts
from cogvideox_sat.shapes.drawing import draw
from cogvideox_sat.shapes.scenes import parse, random_scenes
from data_video import SFTDataset
from tools.make_shapes_dataset import main
from videos import read_video

TOOL = Path(__file__).parents[2] / "tools" / "make_shapes_dataset.py"


def make(folder: Path, *switches: str, **settings) -> int:
    settings = {"clips": 2, "frames": 5, "seed": 0, **settings}
    values = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    return main(["--output", str(folder), *values, *switches])


def make_prompts(file: Path, *switches: str, **settings) -> int:
    return make(file.parent / "unused", "--prompts_file", str(file), *switches, **{"prompts": 3, **settings})


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.rglob("*") if f.is_file()
    }


def test_it_is_read_as_training_data(tmp_path):
    assert make(tmp_path / "shapes", clips=3, frames=9) == 0
    dataset = SFTDataset(tmp_path / "shapes", [64, 96], fps=8, max_num_frames=9, skip_frms_num=0)
    scenes = random_scenes(3, 0)
    assert [parse(dataset[index]["txt"]) for index in range(3)] == scenes
    assert all(dataset[index]["mp4"].shape == (9, 3, 64, 96) for index in range(3))
    meta, frames = read_video(tmp_path / "shapes" / "videos" / "00001.mp4")
    assert meta["fps"] == 8
    assert (frames - draw(scenes[1], 9, 64, 96)).abs().mean() < 0.006  # not a compressed video


@pytest.mark.slow
def test_clips_begin_at_the_moments_asked_for(tmp_path):
    """Clips have the captions of those from the start; other moments are another dataset."""
    assert make(tmp_path / "shapes", "--begins", "0", "0.5", clips=8, frames=9) == 0
    begins = []
    for number, scene in enumerate(random_scenes(8, 0)):
        frames = read_video(tmp_path / "shapes" / "videos" / f"{number:05d}.mp4")[1]
        assert parse((tmp_path / "shapes" / "labels" / f"{number:05d}.txt").read_text()) == scene
        errors = {begin: (frames - draw(scene, 9, 64, 96, begin)).abs().mean() for begin in (0.0, 0.5)}
        begins.append(min(errors, key=errors.get))
        assert errors[begins[-1]] < 0.01 < max(errors.values())
    assert set(begins) == {0.0, 0.5}
    before = files(tmp_path / "shapes")
    assert make(tmp_path / "shapes", "--begins", "0", "0.5", clips=8, frames=9) == 0
    assert files(tmp_path / "shapes") == before
    assert make(tmp_path / "shapes", "--begins", "-1") == 2


def test_what_begins_in_the_middle_goes_on(tmp_path):
    scene = random_scenes(1, 0, motions=["moving in a circle"])[0]
    assert torch.equal(draw(scene, 9, 64, 64, 0.5)[:5], draw(scene, 9, 64, 64)[4:])


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_clips_and_images_are_of_the_split(tmp_path, split):
    assert make(tmp_path / "shapes", "--split", split, images=5) == 0
    labels = [*(tmp_path / "shapes").glob("*/*.txt")]
    assert len(labels) == 7
    assert {parse(label.read_text()).split for label in labels} == {split}


def captions_in(folder: Path) -> list[str]:
    return [label.read_text() for label in folder.glob("*/*.txt")]


@pytest.mark.parametrize(("concept", "said"), [("star", " purple star "), ("spiral", " in a spiral")])
def test_a_concept_is_drawn_alone(tmp_path, concept, said):
    assert make(tmp_path / "shapes", "--concept", concept) == 0
    assert all(said in caption for caption in captions_in(tmp_path / "shapes"))


def test_only_the_shapes_asked_for_are_drawn(tmp_path):
    """In clips, images and prompts, and a dataset of other shapes is another."""
    assert make(tmp_path / "shapes", "--shapes", "ring", "cross", images=6, clips=4) == 0
    captions = captions_in(tmp_path / "shapes")
    assert {item.shape for caption in captions for item in parse(caption).items} == {"ring", "cross"}
    before = files(tmp_path / "shapes")
    assert make(tmp_path / "shapes", "--shapes", "ring", "cross", images=6, clips=4) == 0
    assert files(tmp_path / "shapes") == before
    assert make(tmp_path / "shapes", "--shapes", "ring", images=6, clips=4) == 0
    assert {item.shape for caption in captions_in(tmp_path / "shapes") for item in parse(caption).items} == {"ring"}
    assert make_prompts(tmp_path / "prompts.txt", "--shapes", "ring", "--concept", "spiral") == 0
    assert (tmp_path / "prompts.txt").read_text().count(" ring ") == 3


def test_images_are_moments_of_other_clips(tmp_path):
    """They are read as clips of one frame, with captions, and are the same for the same seed."""
    for name in ("a", "b"):
        assert make(tmp_path / name, clips=1, images=3) == 0
    data = SFTDataset(str(tmp_path / "a"), [64, 96], fps=8, max_num_frames=5, skip_frms_num=0)
    assert sorted(data.bucket(index).frames for index in range(len(data))) == [1, 1, 1, 5]
    images = [data[index] for index in range(len(data)) if data.bucket(index).frames == 1]
    assert all(image["mp4"].shape == (1, 3, 64, 96) and " background" in image["txt"] for image in images)
    assert len({image["mp4"].numpy().tobytes() for image in images}) == 3
    contents = [{name: data for name, (_, data) in files(tmp_path / folder / "images").items()} for folder in "ab"]
    assert contents[0] == contents[1]


def test_the_same_settings_give_the_same_files_and_others_replace_them(tmp_path):
    assert make(tmp_path / "one") == make(tmp_path / "two") == 0
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert {name: content for name, (_, content) in one.items()} == {
        name: content for name, (_, content) in two.items()
    }
    assert make(tmp_path / "one") == 0
    assert files(tmp_path / "one") == one
    assert make(tmp_path / "one", seed=1, clips=1) == 0
    assert sorted(files(tmp_path / "one")) == [".shapes.json", "labels/00000.txt", "videos/00000.mp4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


# ---------------------------------------------------------------- prompts


def test_prompts_are_read_by_sampling(tmp_path):
    file = tmp_path / "prompts.txt"
    assert make_prompts(file, "--split", "held_out") == 0
    scenes = [parse(request.text) for request in read_prompts(file, image_to_video=False)]
    assert scenes == random_scenes(3, 0, "held_out", pairs=False)
    assert {len(scene.items) for scene in scenes} == {1}
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]
    assert make_prompts(tmp_path / "stars.txt", "--concept", "star") == 0
    assert (tmp_path / "stars.txt").read_text().count(" purple star ") == 3


def test_prompts_with_first_frames_begin_the_clips_beside_them(tmp_path):
    assert make_prompts(tmp_path / "prompts.txt", "--with_first_frames") == 0
    requests = read_prompts(tmp_path / "prompts.txt", image_to_video=True)
    assert [parse(request.text) for request in requests] == random_scenes(3, 0, pairs=False)
    for request in requests:
        assert request.image.parent == tmp_path / "prompts"
        with Image.open(request.image) as image:
            assert image.size == (96, 64)
        _, clip = read_video(request.image.with_suffix(".mp4"))
        assert len(clip) == 5
        assert (load_condition_image(request.image, (64, 96)) - clip[0]).abs().mean() < 0.006


def test_last_frames_end_the_clips_beside_them(tmp_path):
    assert make_prompts(tmp_path / "prompts.txt", "--with_first_frames", "--with_last_frames") == 0
    for request in read_prompts(tmp_path / "prompts.txt", image_to_video=True):
        (last,) = request.keyframes
        assert (last.at, last.path.parent) == (-1, tmp_path / "prompts")
        _, clip = read_video(request.image.with_suffix(".mp4"))
        assert (load_condition_image(last.path, (64, 96)) - clip[-1]).abs().mean() < 0.006


def test_prompt_files_are_made_again_but_never_replaced(tmp_path):
    for _ in range(2):
        assert make_prompts(tmp_path / "a.txt", "--with_first_frames") == 0
        before = files(tmp_path / "a")
    assert files(tmp_path / "a") == before
    assert make_prompts(tmp_path / "a.txt", "--with_first_frames", frames=9) == 2
    assert make_prompts(tmp_path / "a.txt", seed=1) == 2
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("precious")
    assert make_prompts(tmp_path / "b.txt", "--with_first_frames") == 2
    assert not (tmp_path / "b.txt").exists()
    assert files(tmp_path / "a") == before
    assert (tmp_path / "b" / "mine.txt").read_text() == "precious"


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_named_and_files_of_others_left_alone(tmp_path, caplog):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("precious")
    (tmp_path / "file").touch()
    with caplog.at_level(logging.ERROR):
        assert make(tmp_path / "mine") == make(tmp_path / "file") == make(tmp_path / "file" / "below") == 2
        assert make(tmp_path / "new", frames=0) == make(tmp_path / "new", "--fps", "inf") == 2
        assert main(["--output", str(tmp_path / "new"), "--size", "64", "97"]) == 2
        assert (
            make_prompts(tmp_path / "new", "--with_first_frames") == make(tmp_path / "new", "--with_first_frames") == 2
        )
        assert make_prompts(tmp_path / "new", prompts=0) == 2
        assert make_prompts(tmp_path / "new.txt", "--with_last_frames") == 2
        assert make(tmp_path / "new", "--concept", "star", "--shapes", "ring") == 2
        assert make(tmp_path / "new", "--concept", "spiral", "--motions", "growing") == 2
    assert [record.getMessage().count("\n") for record in caplog.records] == [0] * 12
    assert "mine exists and was not made by this tool" in caplog.text
    assert "--size: got 64 97; both must be even" in caplog.text
    assert (tmp_path / "mine" / "a.txt").read_text() == "precious"
    assert not (tmp_path / "new").exists()


def test_help_and_a_second_run_import_nothing_heavy(tmp_path):
    make(tmp_path / "shapes")
    settings = ["--clips", "2", "--frames", "5", "--output", str(tmp_path / "shapes")]
    code = "import sys; sys.argv = sys.argv[1:]; import runpy\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: assert 'torch' not in sys.modules"
    for arguments in (["--help"], settings):
        subprocess.run([sys.executable, "-c", code, TOOL, *arguments], capture_output=True, check=True)
