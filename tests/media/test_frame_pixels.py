"""Test that images have the right colours, orientation, square pixels and standard range."""

import itertools
import subprocess
from pathlib import Path

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from cogvideox_sat.media.pyav_reading import PyavVideo
from training_clips import convert

BLOCK = 16
COLOURS = np.array(list(itertools.product([0, 64, 128, 192, 255], repeat=3)), np.uint8)
LOSSLESS = ("-c:v", "ffv1")


def blocks(colours: np.ndarray, columns: int = 25) -> np.ndarray:
    """Return a picture with a block of each colour."""
    rows = colours.reshape(-1, columns, 3)
    return rows.repeat(BLOCK, axis=0).repeat(BLOCK, axis=1)


def centres(picture: np.ndarray) -> np.ndarray:
    return picture[BLOCK // 2 :: BLOCK, BLOCK // 2 :: BLOCK].reshape(-1, 3).astype(int)


def encode(path: Path, pixels: np.ndarray, *options: str) -> Path:
    """Write a video of one picture, uint8 or uint16 (h, w, 3), RGB."""
    height, width = pixels.shape[:2]
    kind = "rgb24" if pixels.dtype == np.uint8 else "rgb48le"
    command = [get_ffmpeg_exe(), "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", kind]
    command += ["-s", f"{width}x{height}", "-r", "5", "-i", "-", *options, str(path)]
    subprocess.run(command, input=pixels.tobytes() * 2, check=True)
    return path


def coded(matrix: str, levels: str, pixel_format: str, tags: str) -> list[str]:
    scale = f"scale=out_color_matrix={matrix}:out_range={levels}:flags=accurate_rnd+full_chroma_int+full_chroma_inp"
    return ["-vf", f"{scale},format={pixel_format},setparams={tags}", "-color_range", levels]


def first_frame(path: Path) -> np.ndarray:
    with PyavVideo(path) as video:
        return next(video.all_frames())


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p", "yuv422p10le"])
@pytest.mark.parametrize("levels", ["tv", "pc"])
@pytest.mark.parametrize(
    ("matrix", "tag"), [("bt709", "bt709"), ("smpte170m", "smpte170m"), ("bt601", "bt470bg"), ("bt2020", "bt2020nc")]
)
def test_colours_follow_the_matrix_and_the_range(tmp_path, matrix, tag, levels, pixel_format):
    options = coded(matrix, levels, pixel_format, f"colorspace={tag}:range={levels}")
    picture = first_frame(encode(tmp_path / "a.mkv", blocks(COLOURS), *options, *LOSSLESS))
    assert np.abs(centres(picture) - COLOURS).max() <= 3


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", ".mp4"), ("mpeg4", ".mp4"), ("prores_ks", ".mov")])
def test_colours_survive_codecs(tmp_path, codec, suffix):
    quality = {"libx264": ("-crf", "1"), "mpeg4": ("-q:v", "1"), "prores_ks": ()}[codec]
    pixel_format = "yuv422p10le" if codec == "prores_ks" else "yuv420p"
    tag = "unknown" if codec == "mpeg4" else "bt709"  # mpeg4 has no tag
    options = coded("bt601" if codec == "mpeg4" else "bt709", "tv", pixel_format, f"colorspace={tag}:range=tv")
    encode(tmp_path / f"a{suffix}", blocks(COLOURS), *options, "-c:v", codec, *quality)
    assert np.abs(centres(first_frame(tmp_path / f"a{suffix}")) - COLOURS).max() <= 6


@pytest.mark.parametrize(("columns", "matrix"), [(5, "bt601"), (125, "bt709")])
def test_an_untagged_video_is_taken_for_bt601_if_it_is_small(tmp_path, columns, matrix):
    options = coded(matrix, "tv", "yuv444p", "colorspace=unknown")
    path = encode(tmp_path / "a.mkv", blocks(COLOURS, columns), *options, *LOSSLESS)
    assert np.abs(centres(first_frame(path)) - COLOURS).max() <= 3


def test_rgb_and_grey_need_no_matrix(tmp_path):
    assert np.array_equal(first_frame(encode(tmp_path / "a.mkv", blocks(COLOURS), *LOSSLESS)), blocks(COLOURS))
    grey = np.arange(0, 250, 10, dtype=np.uint8)[:, None].repeat(3, axis=1)
    path = encode(tmp_path / "b.mkv", blocks(grey), "-pix_fmt", "gray", *LOSSLESS)
    assert np.abs(centres(first_frame(path)) - grey).max() <= 1


# ---------------------------------------------------------------- shape


def quarters() -> np.ndarray:
    """Return an image (32 high, 64 wide) with red and green above blue and white."""
    return np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8).repeat(16, 0).repeat(32, 1)


@pytest.mark.parametrize(
    ("options", "turned"),
    [
        (["-display_rotation", "90"], lambda picture: np.rot90(picture, 1)),  # against the clock
        (["-display_rotation", "180"], lambda picture: np.rot90(picture, 2)),
        (["-display_rotation", "-90"], lambda picture: np.rot90(picture, 3)),
        (["-display_rotation", "270"], lambda picture: np.rot90(picture, 3)),
        (["-display_hflip"], lambda picture: picture[:, ::-1]),
        (["-display_vflip"], lambda picture: picture[::-1]),
        (["-display_rotation", "90", "-display_hflip"], None),
        (["-display_rotation", "270", "-display_vflip"], None),
        (["-display_rotation", "88"], lambda picture: np.rot90(picture, 1)),
    ],
)
def test_metadata_that_turn_or_mirror(tmp_path, options, turned):
    plain = encode(tmp_path / "a.mp4", quarters(), "-c:v", "libx264rgb", "-crf", "0")
    path = convert(plain, tmp_path / "b.mp4", "-c", "copy", before=options)
    picture = first_frame(path)
    if turned:
        expected = turned(quarters())
    else:  # FFmpeg's conversion
        command = [get_ffmpeg_exe(), "-loglevel", "error", "-i", path, "-frames:v", "1", "-f", "rawvideo"]
        raw = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], check=True, capture_output=True).stdout
        expected = np.frombuffer(raw, np.uint8).reshape(64, 32, 3)
    with PyavVideo(path) as video:
        assert video.facts[:2] == picture.shape[1::-1] == expected.shape[1::-1]
    assert np.abs(picture.astype(int) - expected).max() <= 3


@pytest.mark.parametrize(
    ("shape", "size"),
    [("64/45", (91, 32)), ("8/9", (64, 36)), ("1/1", (64, 32)), ("2/1", (128, 32)), ("300/1", (64, 32))],
)
def test_pixels_become_square(tmp_path, shape, size):
    path = encode(tmp_path / "a.mkv", quarters(), "-vf", f"setsar={shape}", *LOSSLESS)
    with PyavVideo(path) as video:
        assert video.facts[:2] == size
        picture = next(video.all_frames())
    assert picture.shape[1::-1] == size
    width, height = size
    assert np.abs(picture[height // 4, [width // 4, 3 * width // 4]].astype(int) - quarters()[8, [16, 48]]).max() <= 2


def test_square_pixels_and_a_quarter_turn(tmp_path):
    plain = encode(tmp_path / "a.mp4", quarters(), "-vf", "setsar=2/1", "-c:v", "libx264rgb", "-crf", "0")
    path = convert(plain, tmp_path / "b.mp4", "-c", "copy", before=["-display_rotation", "90"])
    with PyavVideo(path) as video:
        assert video.facts[:2] == (32, 128)
        assert next(video.all_frames()).shape == (128, 32, 3)


def test_transparent_parts_are_white(tmp_path):
    pixels = np.zeros((32, 64, 4), np.uint8)
    pixels[:, :32] = (255, 0, 0, 255)
    pixels[:16, 32:] = (0, 0, 255, 128)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for suffix, codec in ((".mkv", ["-c:v", "ffv1"]), (".mov", ["-c:v", "prores_ks", "-pix_fmt", "yuva444p10le"])):
        picture = first_frame(convert(tmp_path / "a.png", tmp_path / f"a{suffix}", *codec)).astype(int)
        for place, colour in (((8, 16), (255, 0, 0)), ((8, 48), (127, 127, 255)), ((24, 48), (255, 255, 255))):
            assert np.abs(picture[place] - colour).max() <= 4


def test_hdr_is_mapped_to_the_standard_range(tmp_path):
    """10 and 100 cd/m2 in PQ and the white of graphics become neither grey nor dim."""
    values = np.array([0, 0.3022, 0.5081, 0.5807, 0.7518], np.float64)  # 0, 10, 100, 203, 1000 cd/m2
    pixels = (values * 65535).astype(np.uint16)[:, None].repeat(3, axis=1)
    tags = "colorspace=bt2020nc:color_primaries=bt2020:color_trc=smpte2084:range=tv"
    options = coded("bt2020", "tv", "yuv420p10le", tags)
    hevc = ["-c:v", "libx265", "-x265-params", "log-level=error:lossless=1"]
    path = encode(tmp_path / "a.mkv", blocks(pixels, 5).repeat(2, axis=0), *options, *hevc)
    found = centres(first_frame(path))[:5, 0]
    assert found[0] == 0
    assert found[1] == pytest.approx(255 * (10 / 203) ** (1 / 2.4), abs=3)
    assert found[2] == pytest.approx(255 * (100 / 203) ** (1 / 2.4), abs=3)
    assert 215 < found[3] < 245  # room for highlights
    assert found[4] == 255
