"""Test the times of frames in containers, and that other files are refused."""

import io
import struct

import pytest

from cogvideox_sat.media.pyav_container import VideoContainer
from cogvideox_sat.media.pyav_reading import PyavVideo
from cogvideox_sat.media.video_facts import UnreadableClip
from cogvideox_sat.media.video_reading import open_video
from training_clips import convert, write_clip


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("video") / "a.mp4", frames=75, fps=25, size=(48, 64))


def test_the_length_of_mp4_is_known_without_reading_its_frames(video):
    class Counted(io.FileIO):
        count = 0

        def readinto(self, buffer):
            read = super().readinto(buffer)
            self.count += read
            return read

        def read(self, size=-1):
            data = super().read(size)
            self.count += len(data)
            return data

    content = video.read_bytes()
    padded = video.parent / "padded.mp4"
    size = struct.unpack(">I", content[:4])[0]  # a box of 8 MB behind the first, which need not be read
    padded.write_bytes(convert(video, video.parent / "b.mp4", "-c", "copy").read_bytes())
    with padded.open("ab") as file:
        file.write(struct.pack(">I4s", 8 + 8_000_000, b"free") + bytes(8_000_000))
    assert size < len(content)
    with Counted(padded, "rb") as file, PyavVideo(file) as opened:
        assert opened.facts == (64, 48, 75, pytest.approx(74 / 25))
        assert file.count < 1_000_000


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi"])
def test_containers_agree(video, tmp_path, suffix):
    path = convert(video, tmp_path / f"a{suffix}", "-c:v", "libx264", "-bf", "0")
    with PyavVideo(path) as opened:
        assert opened.facts[:3] == (64, 48, 75)
        assert opened.facts.seconds == pytest.approx(74 / 25, abs=1e-3)


def test_an_index_that_lists_more_than_there_is_means_damage(video, tmp_path):
    path = convert(video, tmp_path / "a.avi", "-c:v", "mjpeg")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    path.write_bytes(content)
    with pytest.raises(UnreadableClip, match=r"damaged: \d+ of 75 frames are missing"), PyavVideo(path) as opened:
        assert opened.facts


def test_files_that_are_no_videos(video, tmp_path):
    (tmp_path / "text.mp4").write_text("no video at all, in spite of its name")
    (tmp_path / "empty.mp4").touch()
    convert("anullsrc", tmp_path / "sound.mp4", "-t", "0.1", before=["-f", "lavfi"])
    (tmp_path / "folder.mp4").mkdir()
    for name, reason in (
        ("text.mp4", "not a video"),
        ("empty.mp4", "not a video"),
        ("sound.mp4", "not a video"),
        ("none.mp4", "No such file or directory"),
        ("folder.mp4", "Is a directory"),
    ):
        with pytest.raises(UnreadableClip, match=reason):
            open_video(tmp_path / name)


def test_playlists_open_no_other_files(video, tmp_path):
    """A playlist could otherwise open any file or address."""
    segment = convert(video, tmp_path / "segment.ts", "-c", "copy")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{segment}\n#EXT-X-ENDLIST\n"
    (tmp_path / "a.mp4").write_text(playlist)
    (tmp_path / "b.mp4").write_text(f"ffconcat version 1.0\nfile {segment.name}\n")
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(UnreadableClip, match="not a video"):
            open_video(tmp_path / name)


def test_names_are_names_and_no_addresses(video, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a.mp4", "a%03d.mp4", "-.mp4", "http:x.mp4", "ä ü\udcff.mp4", "pipe:0"):
        (tmp_path / name).write_bytes(video.read_bytes())
        with open_video(name) as opened:
            assert opened.facts.frames == 75


def test_a_size_that_no_frame_has_is_no_reason_to_take_all_memory(video, tmp_path):
    content = bytearray(video.read_bytes())
    place = content.index(b"avc1") + 4 + 24  # of the sample's description: width and height
    content[place : place + 4] = struct.pack(">HH", 65535, 65535)
    (tmp_path / "a.mp4").write_bytes(content)
    with open_video(tmp_path / "a.mp4") as opened:  # the frames know better
        assert opened.facts[:2] == (64, 48)


def test_damage_anywhere_in_the_header_is_no_crash(video, tmp_path):
    content = video.read_bytes()
    header = content.index(b"mdat") - 4
    for position in range(8, header, 29):
        damaged = content[:position] + b"\xff\xff\xff\xff" + content[position + 4 :]
        try:
            with open_video(io.BytesIO(damaged)) as opened:
                assert opened.facts.frames > 0
                for frame in opened.frames_at([0, 1]):
                    assert frame.ndim == 3
        except UnreadableClip as problem:
            assert str(problem)


def test_a_stream_that_cannot_be_sought_in_is_opened_again(video, tmp_path, monkeypatch):
    path = convert(video, tmp_path / "a.mkv", "-c", "copy")
    container = VideoContainer(path, 1)
    first = [packet.pts for packet in container.from_beginning()]

    def no_seeking(*_, **__):
        import av

        raise av.error.PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(container, "seek", no_seeking)
    assert [packet.pts for packet in container.from_beginning()] == first
    container.close()
