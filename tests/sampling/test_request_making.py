"""Videos from clips and key frames by lines, flags and records; errors are one line."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from cogvideox_sat.clips.input_video import read_input_video
from long_cases import others_long
from sample_video import main
from training_clips import write_clip
from videos import read_video

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

TEXT = "a paper boat"


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", frames=13, fps=8)


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "a.png")
    return tmp_path / "a.png"


def sample(tiny, folder: Path, family: str, lines: list, *flags: str, expected: int = 0) -> list[Path]:
    """Run the command on lines of a prompt file; return the videos."""
    is_json = not isinstance(lines[0], str)
    file = folder / ("prompts.jsonl" if is_json else "prompts.txt")
    file.write_text("".join(f"{json.dumps(line) if is_json else line}\n" for line in lines))
    frames = "4" if family.startswith("1.5") else "3"
    given = ["--base", tiny.config(family), "--input_file", file, "--output_dir", folder / "videos", "--overwrite"]
    given += ["--sampling_num_frames", frames, "--sampling_image_size", "32", "48", "--steps", "2", "--offload", "none"]
    assert main([*map(str, given), *flags]) == expected
    return sorted((folder / "videos").rglob("*.mp4"))


def record_of(video: Path) -> dict:
    return json.loads(video.with_suffix(".json").read_text())


@pytest.mark.parametrize("family", others_long("1.5_i2v", "5b"))
def test_lines_and_flags_say_the_same(tiny, tmp_path, clip, family):
    """A video starts from a clip, its first frame, or continues it; the record repeats it."""
    line = {"prompt": TEXT, "video": str(clip), "strength": 0.5}
    (by_line,) = sample(tiny, tmp_path / make(tmp_path, "line"), family, [line])
    flags = ("--video", str(clip), "--strength", "0.5")
    (by_flag,) = sample(tiny, tmp_path / make(tmp_path, "flag"), family, [TEXT], *flags)
    assert by_line.read_bytes() == by_flag.read_bytes()
    record = record_of(by_line)
    assert record["video_from"]["path"] == str(clip) and record["strength"] == 0.5 and record["frames"] == 9
    again = ["--input_file", str(by_line.with_suffix(".json")), "--output_dir", str(tmp_path / "again")]
    assert main(again) == 0
    (repeated,) = (tmp_path / "again").rglob("*.mp4")
    assert repeated.read_bytes() == by_line.read_bytes()


def make(folder: Path, name: str) -> str:
    (folder / name).mkdir()
    return name


def test_a_clip_is_continued_and_kept(tiny, tmp_path, clip):
    """All of its frames are in the video, then those of two windows."""
    (video,) = sample(tiny, tmp_path, "5b", [{"prompt": TEXT, "video": str(clip), "extend": ["one", "two"]}])
    _, frames = read_video(video)
    assert len(frames) == 13 + 2 * 4 == record_of(video)["frames"]
    original = read_input_video(clip, (32, 48), 13, 8)
    assert (frames[:13] - original).abs().mean() < 0.1
    assert record_of(video)["extend"] == ["one", "two"]


def test_a_last_frame_in_a_line_of_text(tiny, tmp_path, picture):
    """`prompt@@first@@last` is a key frame at -1; other text belongs to the prompt."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "b.png")
    lines = [f"{TEXT}@@{picture}@@{tmp_path / 'b.png'}", f"{TEXT}@@{picture}", f"{TEXT}@@at night@@{picture}"]
    both, first, named = sample(tiny, tmp_path, "5b_i2v", lines, "--seed", "3")
    assert record_of(both)["keyframes"][0]["at"] == -1 and "keyframes" not in record_of(first)
    assert record_of(named)["prompt"] == f"{TEXT}@@at night"
    (tmp_path / "flag").mkdir()
    flags = ("--seed", "3", "--keyframes", f"{tmp_path / 'b.png'}:-1")
    (by_flag,) = sample(tiny, tmp_path / "flag", "5b_i2v", lines[1:2], *flags)
    assert torch.equal(read_video(by_flag)[1], read_video(both)[1])


def test_one_bad_clip_costs_its_own_video(tiny, tmp_path, clip, caplog):
    """A short clip, a file that is not a video, and a missing picture fail alone.

    Nothing half-written stays.
    """
    (tmp_path / "text.mp4").write_text("no video")
    short = write_clip(tmp_path / "short.mp4", frames=4, fps=8)
    shown = [tmp_path / "text.mp4", short, clip]
    lines = [{"prompt": TEXT, "video": str(path)} for path in shown]
    videos = sample(tiny, tmp_path, "5b", lines, expected=1)
    assert len(videos) == 1 and not list((tmp_path / "videos").rglob("*.part"))
    failed = [record.getMessage() for record in caplog.records if record.getMessage().startswith("failed: ")]
    assert len(failed) == 2
    assert (
        "text.mp4: not a video" in failed[0] and "it has 4 frames at 8 frames per second, but 9 are needed" in failed[1]
    )


@pytest.mark.parametrize(
    ("family", "line", "flags", "says"),
    [
        ("5b", {"strength": 0.5}, (), "strength: `video` is missing; give `video` too"),
        ("5b", {"strength": 2}, (), "'strength' must be a number from 0 to 1"),
        ("5b", {"video": "gone.mp4"}, (), "video gone.mp4 does not exist"),
        ("5b", {}, ("--video", "gone.mp4"), "video: gone.mp4 does not exist"),
        ("5b", {}, ("--strength", "7"), "strength: got 7.0; expected a number from 0 to 1"),
        ("5b", {"extend": 0}, (), "'extend' must be a whole number from 1"),
        ("5b", {"extend": 1}, ("--only_save_latents",), "extend: windows continue decoded frames"),
        ("5b", {"extend": 1, "frames": 1}, (), "extend: a window has 1 frames"),
        ("5b", {"keyframes": [{"image": "PICTURE", "at": 0}]}, (), "text-to-video model"),
        (
            "5b_i2v",
            {"image": "PICTURE", "keyframes": [{"image": "PICTURE", "at": 9}]},
            (),
            "at: got 9; the video has 9",
        ),
        ("5b_i2v", {"image": "PICTURE", "keyframes": [{"image": "gone.png", "at": 8}]}, (), "image gone.png does not"),
        ("5b_i2v", {"image": "PICTURE", "keyframes": [{"at": 8}]}, (), "'keyframes' must be a list of objects"),
        ("5b_i2v", {"image": "PICTURE"}, ("--keyframes", "PICTURE"), "expected IMAGE:AT, such as last.png:-1"),
        ("5b_i2v", {}, (), "an image-to-video model needs an image"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_loaded(tiny, tmp_path, picture, caplog, family, line, flags, says):
    line = json.loads(json.dumps({"prompt": TEXT, **line}).replace("PICTURE", str(picture)))
    sample(tiny, tmp_path, family, [line], *(flag.replace("PICTURE", str(picture)) for flag in flags), expected=2)
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1 and says in errors[0]
    assert not (tmp_path / "videos").exists()
