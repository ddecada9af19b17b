"""The generated clips show what their captions say, and are made only when needed."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_video import SFTDataset
from tools.make_shapes_dataset import COLOURS, MOTIONS, SHAPES, SIZES, Scene, draw, main, random_scenes
from videos import read_video

TOOL = Path(__file__).parents[2] / "tools" / "make_shapes_dataset.py"


def make(folder: Path, **settings) -> int:
    settings = {"clips": 2, "frames": 5, "seed": 0, **settings}
    return main(
        ["--output", str(folder), *(str(part) for key, value in settings.items() for part in (f"--{key}", value))]
    )


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.rglob("*") if f.is_file()
    }


def scene(shape="circle", motion="standing still", size="large", phase=0.5) -> Scene:
    return Scene(size, "red", shape, motion, "blue", phase, offset=0.0)


def mask(clip: torch.Tensor) -> torch.Tensor:
    """Where the red shape is on the blue background."""
    return clip[:, 0] > clip[:, 2]


def test_it_is_read_as_training_data(tmp_path):
    assert make(tmp_path / "shapes", clips=3, frames=9) == 0
    dataset = SFTDataset(tmp_path / "shapes", [64, 96], fps=8, max_num_frames=9, skip_frms_num=0)
    assert len(dataset) == 3
    assert [dataset[index]["txt"] for index in range(3)] == [scene.caption for scene in random_scenes(3, 0)]
    assert all(dataset[index]["mp4"].shape == (9, 3, 64, 96) for index in range(3))
    meta, frames = read_video(tmp_path / "shapes" / "videos" / "00001.mp4")
    assert meta["fps"] == 8
    assert (frames - draw(random_scenes(3, 0)[1], 9, 64, 96)).abs().mean() < 0.05


def test_captions_are_english_and_differ():
    assert scene().caption == "a large red circle standing still on a blue background"
    assert Scene("small", "red", "ring", "moving up", "orange", 0, 0).caption.endswith("on an orange background")
    captions = [scene.caption for scene in random_scenes(500, seed=3)]
    assert len(set(captions)) == 500
    assert all(any(word in caption for caption in captions) for word in (*COLOURS, *SHAPES, *SIZES, *MOTIONS))


@pytest.mark.parametrize(
    ("motion", "down", "right"),
    [
        ("moving left", 0, -1),
        ("moving right", 0, 1),
        ("moving up", -1, 0),
        ("moving down", 1, 0),
        ("standing still", 0, 0),
    ],
)
def test_shapes_move_as_their_captions_say(motion, down, right):
    where = [m.nonzero().float().mean(dim=0) for m in mask(draw(scene(motion=motion), 9, 64, 96))]
    steps = torch.stack(where).diff(dim=0)
    assert (steps[:, 0].sign() == down).all() or (down == 0 and steps[:, 0].abs().max() < 0.1)
    assert (steps[:, 1].sign() == right).all() or (right == 0 and steps[:, 1].abs().max() < 0.1)


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_stay_in_the_picture_and_keep_their_size(shape, motion):
    for phase in (0.0, 0.99):
        area = mask(draw(scene(shape, motion, phase=phase), 9, 64, 96)).sum(dim=(1, 2)).float()
        assert area.min() > 100
        assert area.max() / area.min() < 1.15
    small = mask(draw(scene(shape, motion, size="small"), 1, 64, 96)).sum()
    assert small < 0.5 * area.min()


def test_shapes_differ():
    masks = [mask(draw(scene(shape), 1, 64, 96)) for shape in SHAPES]
    assert all((one ^ other).sum() > 50 for i, one in enumerate(masks) for other in masks[:i])


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


def test_mistakes_are_named_and_files_of_others_left_alone(tmp_path, caplog):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("precious")
    (tmp_path / "file").touch()
    with caplog.at_level(logging.ERROR):
        assert make(tmp_path / "mine") == make(tmp_path / "file") == make(tmp_path / "file" / "below") == 1
        assert make(tmp_path / "new", frames=0) == 1
        assert main(["--output", str(tmp_path / "new"), "--size", "64", "97"]) == 1
    assert [record.getMessage().count("\n") for record in caplog.records] == [0] * 5
    assert "mine exists and was not made by this tool" in caplog.text
    assert "must be even, got 64 and 97" in caplog.text
    assert (tmp_path / "mine" / "a.txt").read_text() == "precious"
    assert not (tmp_path / "new").exists()


def test_help_and_a_second_run_import_nothing_heavy(tmp_path):
    make(tmp_path / "shapes")
    settings = ["--clips", "2", "--frames", "5", "--output", str(tmp_path / "shapes")]
    code = "import sys; sys.argv = sys.argv[1:]; import runpy\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: assert 'torch' not in sys.modules"
    for arguments in (["--help"], settings):
        subprocess.run([sys.executable, "-c", code, TOOL, *arguments], capture_output=True, check=True)
