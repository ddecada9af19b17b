"""The tiny model in assets/tiny is complete and shows the content of prompts.

Six videos are sampled; measurements are in the model card.
"""

import hashlib
from pathlib import Path

import pytest

from cogvideox_sat.files.output_paths import output_path
from cogvideox_sat.media.image_inputs import load_condition_image
from cogvideox_sat.media.pixel_error import psnr
from cogvideox_sat.sampling.prompt_files import read_prompts
from cogvideox_sat.shapes.judge import judge
from cogvideox_sat.shapes.scenes import parse
from sample_video import main
from tools.make_shapes_dataset import main as make_dataset
from videos import read_video

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets" / "tiny"
PROMPTS = ROOT / "configs" / "test.txt"


def test_the_files_are_those_of_the_checksums_and_small():
    expected = dict(reversed(line.split(maxsplit=1)) for line in (ASSETS / "SHA256SUMS").read_text().splitlines())
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    found = {path.relative_to(ASSETS).as_posix(): path for path in files}
    weights = {name for name in found if not name.endswith((".md", ".png", ".webp"))}
    assert expected.keys() == weights - {"SHA256SUMS"}
    for name, digest in expected.items():
        assert hashlib.sha256(found[name].read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in files) <= 32e6


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    base = [str(ROOT / "configs" / "tiny" / name) for name in ("cogvideox_tiny.yaml", "inference.yaml")]
    sheet = ["--contact_sheet", str(folder / "sheet.png")]
    assert (
        main(["--base", *base, "--input_file", str(PROMPTS), "--output_dir", str(folder), "--seed", "42", *sheet]) == 0
    )
    return folder


def test_videos_show_what_their_prompts_say(videos):
    """Five of six videos show the colour, motion and background, and four the shape.

    By chance one would.
    """
    right = {"colour": 0, "shape": 0, "motion": 0, "background": 0}
    for request in read_prompts(PROMPTS):
        wanted = parse(request.text)
        _, frames = read_video(output_path(videos, request.index, request.text, 0))
        seen = judge(frames)
        for aspect in ("colour", "shape", "motion"):
            right[aspect] += getattr(wanted.items[0], aspect) in [getattr(item, aspect) for item in seen.items]
        right["background"] += seen.background == wanted.background
    assert right.pop("shape") >= 4
    assert min(right.values()) >= 5, right


def test_image_to_video_keeps_the_frames_it_is_given(tmp_path):
    """The first frame, and the last one of two videos, are as given: 30 and 28 dB in the card."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "videos"
    drawn = ["--prompts_file", str(prompts), "--prompts", "4", "--split", "held_out", "--with_first_frames"]
    assert make_dataset([*drawn, "--with_last_frames", "--frames", "9", "--size", "64", "64"]) == 0
    lines = prompts.read_text().splitlines()
    prompts.write_text("\n".join([*lines[:2], *(line.rpartition("@@")[0] for line in lines[2:])]) + "\n")
    base = [str(ROOT / "configs" / name) for name in ("tiny/cogvideox_tiny_i2v.yaml", "inference.yaml")]
    assert main(["--base", *base, "--input_file", str(prompts), "--output_dir", str(output), "--seed", "7"]) == 0
    moves = ends = 0
    for request in read_prompts(prompts, image_to_video=True):
        _, frames = read_video(output_path(output, request.index, request.text, 0))
        assert psnr(frames[:1], load_condition_image(request.image, (64, 64))[None]).item() > 25
        for last in request.keyframes or ():
            assert psnr(frames[-1:], load_condition_image(last.path, (64, 64))[None]).item() > 23
            ends += 1
        moves += judge(frames).items[0].motion == parse(request.text).items[0].motion
    assert moves >= 3 and ends == 2


def test_a_video_continues_over_another_window(tmp_path):
    """Shapes keep motion and colour; the card counts 50 videos of up to five windows."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "videos"
    motions = ["moving in a circle", "standing still"]
    assert make_dataset(["--prompts_file", str(prompts), "--prompts", "2", "--seed", "31", "--motions", *motions]) == 0
    base = [str(ROOT / "configs" / name) for name in ("tiny/cogvideox_tiny_continue.yaml", "inference.yaml")]
    arguments = ["--input_file", str(prompts), "--output_dir", str(output), "--seed", "7", "--extend", "1"]
    assert main(["--base", *base, *arguments]) == 0
    right = 0
    for request in read_prompts(prompts):
        _, frames = read_video(output_path(output, request.index, request.text, 0))
        assert len(frames) == 9 + 4
        wanted, seen = parse(request.text).items[0], judge(frames, clips=1.5).items[0]
        right += (seen.motion, seen.colour) == (wanted.motion, wanted.colour)
    assert right == 2


def test_the_contact_sheet_is_there(videos):
    from PIL import Image

    with Image.open(videos / "sheet.png") as sheet:
        assert sheet.height > 6 * 128
