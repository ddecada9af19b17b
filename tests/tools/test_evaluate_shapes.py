"""The command counts correct videos, finds them by their names, and computes chance."""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cogvideox_sat.files.output_paths import output_path
from cogvideox_sat.media.video_output import VideoWriter
from cogvideox_sat.sampling.prompt_files import read_prompts
from cogvideox_sat.shapes.drawing import draw, draw_moments
from cogvideox_sat.shapes.report import ASPECTS, by_chance, compare
from cogvideox_sat.shapes.scenes import Item, Scene, parse
from tools import make_shapes_dataset
from tools.evaluate_shapes import main

TOOL = Path(__file__).parents[2] / "tools" / "evaluate_shapes.py"
RED = Scene((Item("large", "red", "circle", "moving left"),), "blue")
GREEN = Scene((Item("large", "green", "circle", "moving up"),), "blue")
PAIR = Scene((*RED.items, Item("small", "green", "square", "growing")), "blue")


pytestmark = pytest.mark.usefixtures("one_thread")


def write_video(path: Path, scene: Scene) -> None:
    with VideoWriter(path, 8, 64, 64) as video:
        video.write(draw(scene, 9, 64, 64))


def evaluate(folder: Path, *arguments: str, own: int = 0) -> int:
    numbers = folder.parent / "numbers.json"
    return main(
        ["--videos", str(folder), "--own_accuracy_clips", str(own), "--json", str(numbers), *map(str, arguments)]
    )


def numbers(folder: Path) -> dict:
    return json.loads((folder.parent / "numbers.json").read_text())


@pytest.mark.slow
def test_videos_are_found_and_counted(tmp_path, caplog, capsys):
    """One of two prompts has two videos, one wrong in two words; the other has none."""
    folder, file = tmp_path / "out", tmp_path / "prompts.txt"
    file.write_text(f"{RED.caption}\n\n{GREEN.caption}\n")
    other = Scene((Item("large", "red", "square", "moving right"),), "blue")
    for number, scene in enumerate((RED, other)):
        write_video(output_path(folder, 0, RED.caption, number), scene)
    assert evaluate(folder, "--input_file", file, own=4) == 0
    found = numbers(folder)
    assert (found["videos"], found["prompts_without_videos"]) == (2, 1)
    right = {"colour": 2, "shape": 1, "motion": 1, "background": 2, "all four": 1, "size": 2, "number of shapes": 2}
    assert found["one_shape"]["right"] == right
    assert found["one_shape"]["by_chance"]["colour"] == 0
    assert found["judge"] == {"count": 4, "right": dict.fromkeys(ASPECTS, 4)}
    assert str(output_path(folder, 2, GREEN.caption, 0)) in caplog.text  # empty lines take a number
    assert "  colour            100.0 %           2/2        0.0 %\n" in capsys.readouterr().out


def test_prompts_are_told_by_the_folders_too(tmp_path):
    caption = "on a blue background, a big red circle is moving left"
    write_video(output_path(tmp_path / "out", 12, caption, 0), RED)
    assert evaluate(tmp_path / "out") == 0
    assert numbers(tmp_path / "out")["one_shape"]["right"]["all four"] == 1


def test_first_frames_are_compared_with_their_images(tmp_path):
    file, folder = tmp_path / "prompts.txt", tmp_path / "out"
    settings = ["--prompts", "2", "--with_first_frames", "--frames", "9", "--size", "64", "64"]
    assert make_shapes_dataset.main(["--prompts_file", str(file), *settings]) == 0
    for request in read_prompts(file):
        path = output_path(folder, request.index, request.text, 0)
        path.parent.mkdir(parents=True)
        path.write_bytes(request.image.with_suffix(".mp4").read_bytes())
    assert evaluate(folder, "--input_file", file) == 0
    assert numbers(folder)["one_shape"]["right"] == dict.fromkeys(ASPECTS, 2)
    assert numbers(folder)["first_frame_psnr"] > 24


def test_the_infinite_psnr_of_an_equal_frame_is_null(tmp_path, capsys):
    folder, file = tmp_path / "out", tmp_path / "prompts.txt"
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    file.write_text(f"{RED.caption}@@white.png\n")
    with VideoWriter(output_path(folder, 0, RED.caption, 0), 8, 64, 64) as video:
        video.write(torch.ones(2, 3, 64, 64))
    assert evaluate(folder, "--input_file", file) == 0
    assert "First frame against its image, dB PSNR: inf" in capsys.readouterr().out
    text = (tmp_path / "numbers.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["first_frame_psnr"] is None


def test_videos_of_several_windows_are_judged_as_long_as_they_are(tmp_path):
    """A circle goes round three times; a repeated first window shows a seam."""
    scene = Scene((Item("small", "red", "circle", "moving in a circle"),), "blue")
    folder, file = tmp_path / "out", tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": scene.caption, "extend": 4}) + "\n")
    path = output_path(folder, 0, scene.caption, 0)
    moving = draw_moments(scene, [frame / 8 % 1 for frame in range(25)], 64, 64)
    with VideoWriter(path, 8, 64, 64) as video:
        video.write(moving)
    assert evaluate(folder, "--input_file", file) == 0
    assert numbers(folder)["one_shape"]["right"]["motion"] == 1
    assert 0.8 < numbers(folder)["seam_ratio"] < 1.2


def test_a_video_made_from_a_clip_is_compared_with_it(tmp_path):
    folder, file, clip = tmp_path / "out", tmp_path / "prompts.jsonl", tmp_path / "clip.mp4"
    write_video(clip, RED)
    green = Scene((replace(RED.items[0], colour="green"),), "blue")
    lines = [{"prompt": scene.caption, "video": str(clip), "strength": 0.5} for scene in (RED, green)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = []
    for index, scene in enumerate((RED, green)):
        write_video(output_path(folder, index, scene.caption, 0), scene)
        assert evaluate(folder, "--input_file", file) == 0
        changes.append(numbers(folder)["change_of_clip"])
    assert changes[0] < 0.01 < changes[1]
    assert numbers(folder)["one_shape"]["right"] == dict.fromkeys(ASPECTS, 2)


def test_two_shapes_are_told_apart_by_colour():
    swapped = Scene(PAIR.items[::-1], "blue")
    assert compare(PAIR, swapped) == [dict.fromkeys(ASPECTS, True)] * 2
    one, other = compare(PAIR, RED)
    assert [name for name in ASPECTS if not one[name]] == ["number of shapes"]
    assert [name for name in ASPECTS if other[name]] == ["background"]


def test_a_single_shape_is_the_first_one_seen_and_nothing_is_wrong():
    (first,) = compare(RED, PAIR)
    assert [name for name in ASPECTS if not first[name]] == ["number of shapes"]
    (nothing,) = compare(RED, Scene((), "none", "none"))
    assert not any(nothing.values())


def test_chance_by_hand():
    """Two of three prompts share a colour: two of six swaps leave the colour right."""
    blue = parse("a large green circle moving left on a white background")
    chance = by_chance([RED, GREEN, blue])
    assert chance["colour"] == pytest.approx(1 / 3)
    assert (chance["shape"], chance["all four"], chance["number of shapes"]) == (1, 0, 1)


def test_mistakes_are_named_in_one_line(tmp_path, caplog):
    (tmp_path / "out" / "0_a_large_red_crimson").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "prompts.txt").write_text(RED.caption)
    broken = output_path(tmp_path / "broken", 0, RED.caption, 0)
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no video")
    cases = {
        "--videos: missing": [],
        "nowhere does not exist": ["--videos", tmp_path / "nowhere"],
        "'crimson'": ["--videos", tmp_path / "out"],
        "has no video of": ["--videos", tmp_path / "empty", "--input_file", tmp_path / "prompts.txt"],
        "none.txt does not exist": ["--videos", tmp_path / "empty", "--input_file", tmp_path / "none.txt"],
        "must be at least 0": ["--videos", tmp_path / "empty", "--own_accuracy_clips", "-1"],
        "cannot read the video": ["--videos", tmp_path / "broken"],
        "unrecognized arguments": ["--video", tmp_path],
    }
    for message, arguments in cases.items():
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            assert main([str(argument) for argument in arguments]) == 2
        (record,) = caplog.records
        assert message in record.getMessage()
        assert "\n" not in record.getMessage()


def test_help_has_an_example_and_imports_nothing_heavy():
    code = "import sys; sys.argv = sys.argv[1:]; import runpy\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, TOOL, "--help"], capture_output=True, check=True, text=True)
    assert "python tools/evaluate_shapes.py --videos outputs/tiny" in done.stdout
