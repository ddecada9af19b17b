"""A run's videos are read from its list, also while it grows or has other lines."""

import json
from pathlib import Path

from cogvideox_sat.runs.videos import RunVideo, read_videos, video_entry


def write_lines(folder: Path, *lines: dict | str) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    (folder / "videos.jsonl").write_text("".join(texts))


def test_an_entry_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "samples" / "20" / "0_a boat.mp4"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    details = {"prompt": "a boat", "shows": ["clip", "sample"]}
    entry = video_entry(tmp_path, "comparisons/clip_0", path, details)
    assert entry["file"] == "samples/20/0_a boat.mp4", "a folder that is moved keeps its videos"
    write_lines(tmp_path, {"step": 20, **entry})
    assert read_videos(tmp_path) == [RunVideo(20, "comparisons/clip_0", path, "a boat", ("clip", "sample"))]


def test_no_list_is_no_videos(tmp_path):
    assert read_videos(tmp_path) == read_videos(tmp_path / "gone") == []


def test_what_is_not_complete_or_gone_is_left_out(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    good = {"step": 0, "name": "samples/0", "file": "a.mp4"}
    strange = [{**good, name: value} for name, value in (("step", "x"), ("file", 5), ("shows", "all"), ("prompt", 1))]
    strange += [{**good, "file": name} for name in ("a" * 300, "a\0b")]
    write_lines(
        tmp_path, *strange, "[]\n", "5\n", "{\n", "\n", {"step": 0, "name": "b", "file": "b.mp4"}, good, '{"step": 20'
    )
    assert read_videos(tmp_path) == [RunVideo(0, "samples/0", tmp_path / "a.mp4")]


def test_of_two_lines_about_one_video_the_last_counts(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"")
    line = {"step": 2, "name": "samples/0", "file": "a.mp4"}
    write_lines(tmp_path, line, {**line, "step": 4}, {**line, "file": "b.mp4"})
    assert [(video.step, video.path.name) for video in read_videos(tmp_path)] == [(4, "a.mp4"), (2, "b.mp4")]
