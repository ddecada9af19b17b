"""Test that frames are those that a player shows, at the right times, for every codec.

Damage is reported.
"""

import io
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvideox_sat.media import pyav_reading
from cogvideox_sat.media.pyav_container import VideoContainer
from cogvideox_sat.media.pyav_reading import PyavVideo
from cogvideox_sat.media.video_facts import UnreadableClip
from training_clips import convert, damage, frame_numbers, truncate, write_clip

COUNT, FPS = 96, 30
ALL = list(range(COUNT))
X264 = ("-c:v", "libx264", "-crf", "12")


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Path:
    """Write a video whose frames show their numbers."""
    return write_clip(tmp_path_factory.mktemp("source") / "numbered.mp4", COUNT, FPS)


@pytest.fixture(scope="module")
def long_group(numbered) -> Path:
    """Write the same video with one key frame only, and frames that are decoded out of order."""
    return convert(numbered, numbered.parent / "long.mp4", *X264, "-g", "250", "-bf", "3")


def shown(frames) -> list[int]:
    """Return the numbers that frames (height, width, 3) show."""
    return frame_numbers(torch.from_numpy(np.stack(list(frames))).permute(0, 3, 1, 2))


def check(path: Path, expected: list[int], fps: float = FPS, seconds: float = 1.1e-3) -> None:
    """Check that all frames are `expected`, at a steady rate, and are found by their times."""
    with PyavVideo(path) as video:
        assert shown(video.all_frames()) == expected
        assert video.facts[:3] == (96, 64, len(expected))
        assert video.facts.seconds == pytest.approx((len(expected) - 1) / fps, abs=seconds)
    for step, first in ((1, 0), (3.75, 0), (3.75, len(expected) / 2), (0.4, len(expected) - 5), (20, 7)):
        places = np.arange(first, len(expected) - 0.6, step)
        with PyavVideo(path) as video:  # nothing is known yet
            found = shown(video.frames_at(places / fps, beyond=1.5 / fps))
        assert found == [expected[math.ceil(place - 0.5 - 1e-6)] for place in places], (step, first)


CODECS = {
    "H.264, open groups": (".mp4", *X264, "-g", "30", "-bf", "3", "-x264-params", "open-gop=1"),
    "H.264, open groups, in Matroska": (".mkv", *X264, "-g", "30", "-bf", "3", "-x264-params", "open-gop=1"),
    "H.264, open groups, in a transport stream": (".ts", *X264, "-g", "30", "-bf", "3", "-x264-params", "open-gop=1"),
    "H.264, 16 frames out of order": (".mp4", *X264, "-bf", "16", "-refs", "16", "-x264-params", "keyint=50"),
    "H.264, one key frame": (".mp4", *X264, "-g", "999"),
    "H.264, key frames only": (".mov", *X264, "-g", "1"),
    "H.264, refreshed without key frames": (".mkv", *X264, "-g", "30", "-x264-params", "intra-refresh=1"),
    "H.264, 4:4:4": (".mp4", *X264, "-g", "30", "-pix_fmt", "yuv444p"),
    "H.264, 10 bit": (".mp4", *X264, "-g", "30", "-pix_fmt", "yuv420p10le"),
    "H.264, RGB": (".mp4", "-c:v", "libx264rgb", "-pix_fmt", "rgb24"),
    "H.264, grey": (".mp4", *X264, "-pix_fmt", "gray"),
    "H.264, full range": (".mp4", *X264, "-vf", "scale=out_range=pc", "-color_range", "pc"),
    "H.264, interlaced": (".ts", *X264, "-g", "30", "-flags", "+ilme+ildct"),
    "H.264, fragments": (".mp4", *X264, "-g", "30", "-movflags", "frag_keyframe+empty_moov", "-bf", "3"),
    "H.264, fragments within groups": (".mp4", *X264, "-g", "30", "-movflags", "dash", "-frag_duration", "300000"),
    "H.264, negative offsets": (".mp4", *X264, "-g", "30", "-movflags", "negative_cts_offsets", "-bf", "3"),
    "H.264 in AVI, out of order": (".avi", *X264, "-g", "30", "-bf", "3"),
    "H.264 in FLV": (".flv", *X264, "-g", "30", "-bf", "3"),
    "HEVC": (".mp4", "-c:v", "libx265", "-x265-params", "log-level=error:keyint=30:open-gop=1"),
    "HEVC in a transport stream": (".ts", "-c:v", "libx265", "-x265-params", "log-level=error:keyint=30:open-gop=1"),
    "HEVC, 10 bit": (".mkv", "-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-x265-params", "log-level=error"),
    "VP8": (".webm", "-c:v", "libvpx", "-b:v", "500k", "-g", "30"),
    "VP9": (".webm", "-c:v", "libvpx-vp9", "-b:v", "500k", "-g", "30", "-deadline", "realtime"),
    "VP9, 10 bit": (".mp4", "-c:v", "libvpx-vp9", "-b:v", "1M", "-pix_fmt", "yuv420p10le", "-deadline", "realtime"),
    "AV1": (".webm", "-c:v", "libaom-av1", "-cpu-used", "8", "-crf", "20", "-g", "30"),
    "AV1 in MP4": (".mp4", "-c:v", "libsvtav1", "-preset", "10", "-g", "30", "-crf", "20"),
    "MPEG-4": (".mp4", "-c:v", "mpeg4", "-q:v", "2", "-g", "30", "-bf", "2"),
    "MPEG-4 in AVI, out of order": (".avi", "-c:v", "mpeg4", "-q:v", "2", "-g", "30", "-bf", "2"),
    "MPEG-2": (".mpg", "-c:v", "mpeg2video", "-q:v", "2", "-g", "15", "-bf", "2"),
    "MPEG-2, interlaced": (".ts", "-c:v", "mpeg2video", "-q:v", "2", "-g", "15", "-bf", "2", "-flags", "+ilme+ildct"),
    "MPEG-1": (".mpg", "-c:v", "mpeg1video", "-q:v", "2", "-g", "15", "-bf", "2"),
    "Motion JPEG": (".avi", "-c:v", "mjpeg", "-q:v", "2", "-pix_fmt", "yuvj420p"),
    "Motion JPEG in MOV": (".mov", "-c:v", "mjpeg", "-q:v", "2", "-pix_fmt", "yuvj422p"),
    "ProRes": (".mov", "-c:v", "prores_ks"),
    "ProRes with alpha": (".mov", "-c:v", "prores_ks", "-pix_fmt", "yuva444p10le"),
    "FFV1": (".mkv", "-c:v", "ffv1", "-g", "30"),
    "Theora": (".ogv", "-c:v", "libtheora", "-q:v", "10", "-g", "30"),
    "MXF": (".mxf", "-c:v", "mpeg2video", "-q:v", "2"),
    "WMV": (".wmv", "-c:v", "wmv2", "-q:v", "2", "-g", "30"),
    "raw": (".mov", "-c:v", "rawvideo", "-pix_fmt", "uyvy422"),
}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.slow
def test_codecs_and_containers(numbered, tmp_path, name):
    suffix, *options = CODECS[name]
    check(convert(numbered, tmp_path / f"a{suffix}", *options), ALL)


@pytest.mark.slow
def test_hidden_frames_of_vp8(numbered, tmp_path):
    """Hidden frames have packets of their own, with the times of other frames."""
    options = ["-c:v", "libvpx", "-b:v", "200k", "-g", "60", "-auto-alt-ref", "1", "-lag-in-frames", "16"]
    passes = ["-passlogfile", str(tmp_path / "log"), "-pass"]
    convert(numbered, tmp_path / "first.webm", *options, *passes, "1")
    path = convert(numbered, tmp_path / "a.webm", *options, *passes, "2")
    container = VideoContainer(path, 1)
    assert len(list(container.packets())) > COUNT
    container.close()
    check(path, ALL)


def test_packets_that_have_no_frame_of_their_own_are_passed_over(numbered, tmp_path, monkeypatch, decoded):
    """The second field of an image may be such a packet; here the decoder drops frames."""
    path = convert(numbered, tmp_path / "a.mkv", *X264, "-g", "24", "-bf", "0")
    clean = PyavVideo._clean

    def swallow(self, packet, key):
        for frame in clean(self, packet, key):
            if round(frame.time * FPS) % 2 == 0:
                yield frame

    monkeypatch.setattr(PyavVideo, "_clean", swallow)
    with PyavVideo(path) as video:
        assert shown(video.frames_at(np.array([60, 61, 65, 70]) / FPS)) == [60, 60, 64, 70]
    assert len(decoded) < 60  # no further back than the key frame

    def swallow_more(self, packet, key):
        for frame in clean(self, packet, key):
            if not 60 <= round(frame.time * FPS) < 70:
                yield frame

    monkeypatch.setattr(PyavVideo, "_clean", swallow_more)
    with PyavVideo(path) as video, pytest.raises(UnreadableClip, match="damaged"):
        list(video.frames_at(np.array([50, 65, 75]) / FPS))


def test_packets_that_say_that_the_frame_before_them_stays(numbered, tmp_path):
    """Frames after such packets keep their times in AVI, whose packets lack times of frames."""
    codec = ("-c:v", "libxvid", "-q:v", "2", "-bf", "2", "-g", "30", "-bsf:v", "mpeg4_unpack_bframes")
    path = convert(numbered, tmp_path / "a.avi", *codec)
    with PyavVideo(path) as video:
        assert 0 < len(list(video.all_frames())) < video.facts.frames
    with PyavVideo(path) as video:
        times = np.arange(1, video.facts.frames - 2)
        numbers = np.array(shown(video.frames_at(times / FPS)))
    assert set(times - numbers) == {0, 1, 2}  # some frames are repeated, as in FFmpeg's own player, and none is early


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_frames_than_the_decoder_holds_back(numbered, tmp_path, count):
    path = convert(numbered, tmp_path / "a.avi", *X264, "-bf", "2", "-frames:v", str(count))
    with PyavVideo(path) as video:
        assert video.facts.frames == count
        assert video.facts.seconds == pytest.approx((count - 1) / FPS, abs=1e-3)
        assert shown(video.frames_at(np.arange(count) / FPS)) == ALL[:count]


@pytest.mark.parametrize(("rate", "suffix"), [("1", ".mp4"), ("30000/1001", ".mkv"), ("120", ".mp4"), ("120", ".mkv")])
def test_rates(numbered, tmp_path, rate, suffix):
    path = convert(numbered, tmp_path / f"a{suffix}", *X264, "-bf", "3", "-g", "20", before=["-r", rate])
    check(path, ALL, float(eval(rate)))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_variable_rate(numbered, tmp_path, suffix):
    kept = "select='lt(t,1)+not(mod(n,3))'"
    path = convert(numbered, tmp_path / f"a{suffix}", *X264, "-vf", kept, "-fps_mode", "vfr", "-bf", "3")
    with PyavVideo(path) as video:
        times = np.arange(0, 3, 0.1)
        assert shown(video.frames_at(times)) == list(range(0, 90, 3))
        assert video.facts.seconds == pytest.approx(93 / FPS, abs=1.1e-3)


# ---------------------------------------------------------------- cuts and offsets


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".m4v"])
def test_of_a_stream_copied_cut_the_frames_before_it_are_hidden(long_group, tmp_path, suffix):
    path = convert(long_group, tmp_path / f"a{suffix}", "-c", "copy", before=["-ss", "2"])
    check(path, ALL[60:])
    part = io.BytesIO(path.read_bytes())  # as in a tar file
    with PyavVideo(part) as video:
        assert video.facts.frames == 36
        assert shown(video.frames_at([0, 0.5, 1])) == [60, 75, 90]


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
@pytest.mark.parametrize("start", [0, 1])
def test_a_cut_at_the_end(long_group, tmp_path, suffix, start):
    """Copying stops in decoding order, so the file may end with a frame that others led up to."""
    path = convert(long_group, tmp_path / f"a{suffix}", "-t", "1.5", "-c", "copy", before=["-ss", str(start)])
    first = 30 * start
    with PyavVideo(path) as video:
        numbers = shown(video.all_frames())
        assert numbers[:45] == ALL[first : first + 45]
        assert all(number > first + 44 for number in numbers[45:])
        assert video.facts.frames == len(numbers) <= 48
        assert shown(video.frames_at(np.arange(45) / FPS)) == numbers[:45]


def test_hidden_frames_at_both_ends_of_an_edit_list(long_group, tmp_path):
    content = bytearray(convert(long_group, tmp_path / "a.mp4", "-c", "copy", before=["-ss", "1"]).read_bytes())
    place = content.index(b"elst") + 12  # type, version and flags, count
    duration = int.from_bytes(content[place : place + 4], "big")  # frames of the 2.2 seconds after the cut
    content[place : place + 4] = round(duration / 2.2).to_bytes(4, "big")
    (tmp_path / "b.mp4").write_bytes(content)
    check(tmp_path / "b.mp4", ALL[30:60])


@pytest.mark.parametrize("suffix", [".mkv", ".ts"])
def test_without_edit_lists_a_cut_shows_all_frames_from_the_key_frame_on(numbered, tmp_path, suffix):
    grouped = convert(numbered, tmp_path / "grouped.mp4", *X264, "-g", "30", "-bf", "3", "-x264-params", "scenecut=0")
    path = convert(grouped, tmp_path / f"a{suffix}", "-c", "copy", before=["-ss", "1.5"])
    check(path, ALL[30:])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_a_cut_within_open_groups_leaves_out_what_cannot_be_decoded(numbered, tmp_path, suffix):
    """Frames after the key frame that are shown before it depend on frames that were cut off."""
    options = ("-c:v", "libx265", "-x265-params", "log-level=error:keyint=30:open-gop=1:bframes=4:b-adapt=0")
    grouped = convert(numbered, tmp_path / "grouped.mp4", *options)
    path = convert(grouped, tmp_path / f"a{suffix}", "-c", "copy", before=["-ss", "1.5"])
    check(path, ALL[45:] if suffix == ".mp4" else ALL[30:])


@pytest.mark.parametrize(
    ("suffix", "offset", "expected"),
    [(".mp4", 2, ALL), (".mp4", -1, ALL[30:]), (".mkv", 5, ALL), (".mkv", -1, ALL), (".ts", 5, ALL)],
)
def test_time_offsets(numbered, tmp_path, suffix, offset, expected):
    grouped = convert(numbered, tmp_path / "grouped.mp4", *X264, "-g", "30", "-bf", "3")
    options = ["-copyts"] if suffix != ".mp4" else ["-avoid_negative_ts", "disabled"] if offset < 0 else []
    path = convert(grouped, tmp_path / f"a{suffix}", "-c", "copy", *options, before=["-itsoffset", str(offset)])
    check(path, expected)


def test_transport_streams_put_one_behind_the_other(numbered, tmp_path):
    options = ["-g", "24", "-bf", "3", "-f", "segment", "-segment_time", "0.8", "-segment_format", "mpegts"]
    convert(numbered, tmp_path / "%d.ts", *X264, *options)
    parts = [path.read_bytes() for path in sorted(tmp_path.glob("*.ts"))]
    assert len(parts) > 2
    (tmp_path / "all.ts").write_bytes(b"".join(parts))
    check(tmp_path / "all.ts", ALL)
    for order in ((1, 0), (0, 0)):
        (tmp_path / "jump.ts").write_bytes(b"".join(parts[i] for i in order))
        with PyavVideo(tmp_path / "jump.ts") as video, pytest.raises(UnreadableClip, match="time stamps jump by -"):
            assert video.facts
    lost = parts[1][: 5 * 188] + parts[1][6 * 188 :]  # a part of a key frame
    (tmp_path / "lost.ts").write_bytes(b"".join([parts[0], lost, *parts[2:]]))
    with PyavVideo(tmp_path / "lost.ts") as video, pytest.raises(UnreadableClip, match="damaged"):
        list(video.all_frames())


def test_sound_that_is_longer_and_a_cover_picture_change_nothing(numbered, tmp_path):
    sound = ["-f", "lavfi", "-i", "sine=d=9"]
    check(convert(numbered, tmp_path / "a.mkv", *X264, "-c:a", "aac", before=sound), ALL)
    cover = convert(numbered, tmp_path / "cover.png", "-frames:v", "1")
    streams = ["-map", "0", "-map", "1", "-c:v:0", "png", "-c:v:1", "copy", "-disposition:v:0", "attached_pic"]
    check(convert(numbered, tmp_path / "a.mp4", *streams, before=["-i", str(cover)]), ALL)


@pytest.mark.parametrize(("size", "codec"), [((16, 16), X264), ((8, 8), ("-c:v", "mjpeg")), ((2, 2), ("-c:v", "ffv1"))])
def test_tiny_and_odd_sizes(numbered, tmp_path, size, codec):
    path = convert(numbered, tmp_path / "a.mkv", *codec, "-vf", f"scale={size[0]}:{size[1]}")
    with PyavVideo(path) as video:
        assert video.facts[:3] == (*size, COUNT)
        assert next(video.frames_at([1.0])).shape == (*size[::-1], 3)
    odd = convert(numbered, tmp_path / "odd.mp4", *X264, "-pix_fmt", "yuv444p", "-vf", "scale=95:63:flags=neighbor")
    with PyavVideo(odd) as video:
        assert video.facts[:2] == (95, 63)
        assert shown(video.frames_at([1.0])) == [30]


# ---------------------------------------------------------------- as little as possible


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Return the list of times, in ticks, of the frames that are decoded."""
    times = []
    clean = PyavVideo._clean

    def counted(self, packet, key):
        for frame in clean(self, packet, key):
            times.append(frame.pts)
            yield frame

    monkeypatch.setattr(PyavVideo, "_clean", counted)
    return times


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_only_the_group_of_a_frame_is_decoded(numbered, tmp_path, decoded, suffix):
    path = convert(numbered, tmp_path / f"a{suffix}", *X264, "-g", "24", "-bf", "3", "-x264-params", "scenecut=0")
    with PyavVideo(path) as video:
        assert shown(video.frames_at([75 / FPS])) == [75]
        assert len(decoded) <= 8
        decoded.clear()
        assert shown(video.frames_at([2 / FPS, 74 / FPS])) == [2, 74]  # no frame of the two groups between them
        assert len(decoded) <= 12


def test_frames_that_no_other_depends_on_are_left_out(long_group, decoded):
    with PyavVideo(long_group) as video:
        assert shown(video.frames_at(np.arange(0, 90, 4) / FPS)) == list(range(0, 90, 4))
    assert len(decoded) < 75


def test_of_key_frames_only_the_wanted_ones_are_decoded(numbered, tmp_path, decoded):
    path = convert(numbered, tmp_path / "a.mov", "-c:v", "prores_ks")
    with PyavVideo(path) as video:
        assert shown(video.frames_at(np.arange(0, 90, 4) / FPS)) == list(range(0, 90, 4))
    assert len(decoded) == 23


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("codec", [X264, ("-c:v", "libx265"), ("-c:v", "mpeg4", "-q:v", "2"), ("-c:v", "libsvtav1")])
def test_damaged_frames_are_told(numbered, tmp_path, codec):
    whole = convert(numbered, tmp_path / "a.mp4", *codec, "-g", "24", "-movflags", "faststart")
    path = damage(whole, tmp_path / "b.mp4")
    with PyavVideo(path) as video, pytest.raises(UnreadableClip, match="damaged"):
        list(video.frames_at(np.arange(COUNT) / FPS))


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mp4", X264), (".mkv", X264), (".webm", ("-c:v", "libvpx-vp9")), (".ts", X264)]
)
def test_random_damage_never_hangs_and_gives_right_frames_or_an_error(numbered, tmp_path, suffix, codec):
    path = convert(numbered, tmp_path / f"a{suffix}", *codec, "-g", "24", "-movflags", "faststart")
    content, told, wrong = path.read_bytes(), 0, 0
    for seed in range(24):
        chance, damaged = random.Random(seed), bytearray(content)
        size = chance.choice([64, 400, 2000])
        place = chance.randrange(len(content) - size)
        damaged[place : place + size] = chance.randbytes(size)
        try:
            with PyavVideo(io.BytesIO(damaged)) as video:
                seconds = video.facts.seconds
                places = np.arange(0, min(seconds * FPS, COUNT - 1) + 0.1, 3.75)
                numbers = shown(video.frames_at(places / FPS, beyond=0.05))
                expected = [math.ceil(place - 0.5 - 1e-6) for place in places]
                wrong += any(abs(a - b) > 3 for a, b in zip(numbers, expected, strict=True))
        except UnreadableClip as problem:
            assert str(problem)
            told += 1
    assert told >= 6
    assert wrong <= 4  # numbers that happen to be whole after damage that no decoder can notice


def test_a_file_that_is_cut_off_is_told(numbered, tmp_path):
    at_the_end = convert(numbered, tmp_path / "a.mp4", *X264)  # its index is what is missing
    faststart = convert(numbered, tmp_path / "b.mp4", *X264, "-movflags", "faststart")
    size = faststart.stat().st_size
    for whole, reason in ((at_the_end, "not a video"), (faststart, f"should have at least {size}")):
        cut = truncate(whole, tmp_path / "cut.mp4", 0.7)
        with pytest.raises(UnreadableClip, match=reason), PyavVideo(cut) as video:
            assert video.facts
    cut = truncate(convert(numbered, tmp_path / "c.mkv", *X264), tmp_path / "cut.mkv", 0.7)
    with PyavVideo(cut) as video:  # is as long as what is there
        frames = video.facts.frames
        assert 40 < frames < 80
        assert shown(video.frames_at(np.arange(frames - 1) / FPS)) == ALL[: frames - 1]
        with pytest.raises(UnreadableClip, match=r"it ends after \d\.\d\d s, before 3\.00 s"):
            list(video.frames_at([1, 3], beyond=0.1))


def test_wrongly_marked_key_frames_take_the_sure_way(numbered, tmp_path, monkeypatch):
    """The file calls every frame a key frame, so decoding from the middle gives wrong frames."""
    path = convert(numbered, tmp_path / "a.mp4", *X264, "-g", "999", "-bf", "0")
    content = path.read_bytes()
    assert b"stss" in content
    path.write_bytes(
        content.replace(b"stss", b"free")
    )  # the list of key frames; without it, all frames count as key frames
    with PyavVideo(path) as video:
        assert shown(video.frames_at(np.arange(40, 90, 3.75) / FPS)) == [
            math.ceil(place - 0.5) for place in np.arange(40, 90, 3.75)
        ]


def test_threads_change_nothing(long_group):
    times = np.arange(0, 3, 0.125)
    with PyavVideo(long_group, threads=1) as one, PyavVideo(long_group, threads=3) as several:
        for a, b in zip(one.frames_at(times), several.frames_at(times), strict=True):
            assert np.array_equal(a, b)


def test_far_apart_frames_are_sought_one_by_one(numbered, tmp_path, monkeypatch):
    monkeypatch.setattr(pyav_reading, "LONGEST_WINDOW", 0.5)
    path = convert(numbered, tmp_path / "a.mkv", *X264, "-g", "24")
    with PyavVideo(path) as video:
        assert shown(video.frames_at([0, 0.1, 1.5, 1.6, 3])) == [0, 3, 45, 48, 90]
