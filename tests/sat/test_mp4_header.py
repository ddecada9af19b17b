"""The header alone tells what the decoder would, and that a file is cut off."""

import struct

import pytest

from clip_reading import ClipInfo, probe
from clip_sources import ClipSource
from mp4_header import read_header
from training_clips import convert, truncate, vary_rate, write_clip


def header_of(path, before=b"", after=b""):
    content = path.read_bytes()
    path.write_bytes(before + content + after)
    with path.open("rb") as file:
        return read_header(file, len(before), len(before) + len(content))


def decoded(path) -> ClipInfo:
    """What opening the video tells; without the suffix that lets its header be read."""
    from decord import VideoReader

    reader = VideoReader(str(path))
    times = reader.get_frame_timestamp(range(len(reader)))[:, 0]
    height, width = reader[0].shape[:2]
    return ClipInfo(width, height, len(reader), float(times[-1] - times[0]))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("video") / "a.mp4", frames=75, fps=25, size=(48, 64))


@pytest.mark.parametrize(
    "kind", ["plain", "no faststart", "b-frames", "variable rate", "rotated", "upside down", "mov"]
)
def test_the_header_agrees_with_the_decoder(video, tmp_path, kind):
    path = tmp_path / "b.mp4"
    if kind == "plain":
        path.write_bytes(video.read_bytes())
    elif kind == "no faststart":  # the header at the end
        convert(video, path, "-c", "copy")
    elif kind == "b-frames":
        convert(video, path, "-bf", "4", "-b_strategy", "0")
    elif kind == "variable rate":
        vary_rate(video, path)
    elif kind == "mov":
        path = convert(video, tmp_path / "b.mov", "-c", "copy")
    else:
        convert(video, path, "-c", "copy", before=["-display_rotation", "90" if kind == "rotated" else "180"])
    expected, header = decoded(path), header_of(path)
    assert header[:3] == expected[:3]
    assert header.seconds == pytest.approx(expected.seconds, abs=1e-4)
    assert (expected.width < expected.height) == (kind == "rotated")


def test_a_file_inside_another_is_read_from_its_place(video, tmp_path):
    path = tmp_path / "b.mp4"
    path.write_bytes(video.read_bytes())
    assert header_of(path, before=b"x" * 700, after=b"y" * 100) == (64, 48, 75, 74 / 25)


def test_a_box_of_64_bit_size_is_stepped_over(video, tmp_path):
    content = video.read_bytes()
    first = struct.unpack(">I", content[:4])[0]
    box = struct.pack(">I4sQ", 1, b"free", 16 + 5) + b"12345"
    path = tmp_path / "b.mp4"
    path.write_bytes(content[:first] + box + content[first:])
    assert header_of(path).frames == 75


@pytest.mark.parametrize("faststart", [True, False])
def test_a_cut_off_file_is_told(video, tmp_path, faststart):
    whole = video if faststart else convert(video, tmp_path / "whole.mp4", "-c", "copy")
    cut = truncate(whole, tmp_path / "cut.mp4", 0.5)
    with pytest.raises(EOFError, match=rf"it should have .* and has {cut.stat().st_size}"):
        header_of(cut)


def test_what_has_no_such_header_is_left_to_the_decoder(video, tmp_path):
    fragmented = convert(video, tmp_path / "f.mp4", "-c", "copy", "-movflags", "frag_keyframe+empty_moov")
    matroska = convert(video, tmp_path / "a.mkv", "-c", "copy")
    sound = convert("anullsrc", tmp_path / "sound.m4a", "-t", "0.1", before=["-f", "lavfi"])
    text, empty = tmp_path / "text.mp4", tmp_path / "empty.mp4"
    text.write_text("no video at all, in spite of its name")
    empty.touch()
    assert [header_of(path) for path in (fragmented, matroska, sound, text, empty)] == [None] * 5
    for path in (fragmented, matroska):
        info = probe(ClipSource(str(path), None))
        assert info[:3] == (64, 48, 75)
        assert info.seconds == pytest.approx(74 / 25, abs=1e-3)


def test_damage_anywhere_in_the_header_is_no_crash(video, tmp_path):
    content = video.read_bytes()
    header = content.index(b"mdat") - 4
    path = tmp_path / "b.mp4"
    for position in range(8, header, 13):
        path.write_bytes(content[:position] + b"\xff\xff\xff\xff" + content[position + 4 :])
        try:
            info = header_of(path)
        except EOFError:
            continue
        assert info is None or info.frames > 0
