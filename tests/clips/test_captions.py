"""Test that captions are found in the common layouts of data sets, each for its own clip."""

import json
import os
import re
from pathlib import Path

import pytest

from cogvideox_sat.clips.sources import LabelRules, search
from sgm.errors import UserError
from training_clips import write_tar


def make(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def in_tar(root: Path, files: dict[str, str | bytes]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    return write_tar(root / "set.tar", {name: c if isinstance(c, bytes) else c.encode() for name, c in files.items()})


def captions(place: Path, **rules) -> list[tuple[str, str | None]]:
    clips = search(str(place), LabelRules(**rules)).clips
    return [(clip.member or os.path.relpath(clip.path, place), clip.caption) for clip in clips]


WRITERS = pytest.mark.parametrize("write", [make, in_tar])


@WRITERS
@pytest.mark.parametrize("list_name", ["prompts.txt", "prompt.txt", "captions.txt"])
def test_lists_line_for_line(tmp_path, write, list_name):
    files = {
        "videos/b.mp4": "",
        "videos/a.mp4": "",
        "videos.txt": "videos/b.mp4\r\nvideos/a.mp4\n",
        list_name: "\ufeffthe b, with a comma\nthe a\n\n",
    }
    assert sorted(captions(write(tmp_path / "set", files))) == [
        ("videos/a.mp4", "the a"),
        ("videos/b.mp4", "the b, with a comma"),
    ]


def test_a_list_says_what_belongs_to_the_data_set(tmp_path):
    """Names are relative to the list's folder or its `videos`.

    Clips that are not listed need a caption of their own.
    """
    make(
        tmp_path,
        {
            "part/videos/a.mp4": "",
            "part/videos/b.mp4": "",
            "part/videos/c.mp4": "",
            "part/videos/c.txt": "its own",
            "part/first_frames/a.png": "",
            "part/videos.txt": "a.mp4\n\n../elsewhere.mp4\n",
            "part/prompts.txt": "an a\n\nfrom elsewhere\n",
            "other/d.mp4": "",
        },
    )
    assert captions(tmp_path) == [
        ("other/d.mp4", None),
        ("part/videos/a.mp4", "an a"),
        ("part/videos/c.mp4", "its own"),
        ("elsewhere.mp4", "from elsewhere"),
    ]
    assert [Path(name).name for name in search(str(tmp_path)).unlisted] == ["a.png", "b.mp4"]


@WRITERS
@pytest.mark.parametrize("caption", ["caption", "prompt", "text", "Prompt"])
@pytest.mark.parametrize("video", ["file_name", "video", "path"])
def test_metadata_in_a_folder(tmp_path, write, video, caption):
    record = {video: "videos/a.mp4", caption: "an a", "duration": 3, "negative_prompt": "no"}
    files = {"videos/a.mp4": "", "metadata.jsonl": json.dumps(record)}
    assert captions(write(tmp_path / "lines", files)) == [("videos/a.mp4", "an a")]
    files = {"in/a.mp4": "", "in/metadata.csv": f'{video}, {caption}\na.mp4, "an a, b"\n'}
    assert captions(write(tmp_path / "table", files)) == [("in/a.mp4", "an a, b")]


def test_several_captions_of_one_clip_are_several_clips(tmp_path):
    make(tmp_path, {"a.mp4": "", "metadata.csv": "file_name,text\na.mp4,one\na.mp4,two\na.mp4,one\n"})
    assert captions(tmp_path) == [("a.mp4", "one"), ("a.mp4", "two")]


def test_a_clips_own_label_wins_over_lists(tmp_path):
    make(tmp_path, {"videos/a.mp4": "", "videos/b.mp4": "", "labels/a.txt": "own"})
    make(tmp_path, {"metadata.csv": "file_name,text\nvideos/a.mp4,list\nvideos/b.mp4,list\n"})
    assert captions(tmp_path) == [("videos/a.mp4", "own"), ("videos/b.mp4", "list")]


def test_files_that_are_labels_are_no_lists(tmp_path):
    make(tmp_path, {"videos.mp4": "", "videos.txt": "not a list", "prompts.mp4": "", "prompts.txt": "neither"})
    make(tmp_path, {"no.mp4": "", "metadata.csv": "camera,lens\n1,2\n"})
    assert captions(tmp_path) == [("no.mp4", None), ("prompts.mp4", "neither"), ("videos.mp4", "not a list")]
    assert re.search("metadata.csv has no column file_name", search(str(tmp_path)).hints[0])


@WRITERS
def test_a_label_of_a_video_is_not_a_pictures(tmp_path, write):
    files = {
        "videos/a.png": "",
        "videos/a.mp4": "",
        "labels/a.txt": "the video",
        "images/a.png": "",
        "images/b.png": "",
        "labels/b.txt": "a picture",
        "flat.jpg": "",
        "flat.mov": "",
        "flat.txt": "the other video",
    }
    assert dict(captions(write(tmp_path / "set", files))) == {
        "flat.jpg": None,
        "flat.mov": "the other video",
        "images/a.png": None,
        "images/b.png": "a picture",
        "videos/a.mp4": "the video",
        "videos/a.png": None,
    }


def test_members_whose_names_have_dots(tmp_path):
    shard = in_tar(
        tmp_path,
        {
            "clip.v1.mp4": "",
            "clip.v1.txt": "version 1",
            "clip.v2.txt": "version 2",
            "clip.v2.mp4": "",
            "in/x.480p.webm": "",
            "in/x.txt": "an x",
            "in/y.1.json": '{"prompt": "a y"}',
            "in/y.1.MP4": "",
        },
    )
    assert captions(shard) == [
        ("clip.v1.mp4", "version 1"),
        ("clip.v2.mp4", "version 2"),
        ("in/x.480p.webm", "an x"),
        ("in/y.1.MP4", "a y"),
    ]


def test_captions_in_a_meta_file_beside_a_shard(tmp_path):
    shard = in_tar(tmp_path, {"k1.mp4": "", "k1.id": "", "k2.mp4": "", "k2.txt": "its own"})
    lines = [{"key": "k1", "caption": "an item", "short": "item"}, {"key": "k2", "caption": "other"}]
    (tmp_path / "set.meta.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert captions(shard) == [("k1.mp4", "an item"), ("k2.mp4", "its own")]
    assert captions(shard, txt_key="short")[0] == ("k1.mp4", "item")


@WRITERS
def test_labels_of_several_lines(tmp_path, write):
    files = {"a.mp4": "", "a.txt": "one\n\n two \r\nthree\n", "b.mp4": "", "b.txt": "\nalone\n", "c.mp4": ""}
    place = write(tmp_path / "set", files)
    assert [caption for _, caption in captions(place)] == ["one", "alone", None]
    assert [caption for _, caption in captions(place, lines="all")] == ["one two three", "alone", None]
    assert search(str(place)).long_labels == 1


def test_other_suffixes_of_labels(tmp_path):
    make(tmp_path, {"a.mp4": "", "a.caption": "an a", "b.mp4": "", "b.json": '{"text": "a b"}', "c.mp4": ""})
    make(tmp_path, {"c.json": '["no", "record"]', "videos/d.mp4": "", "captions/d.txt": "a d"})
    assert captions(tmp_path) == [("a.mp4", "an a"), ("b.mp4", "a b"), ("c.mp4", None), ("videos/d.mp4", "a d")]


def test_a_key_may_be_named(tmp_path):
    path = (
        make(tmp_path, {"set.jsonl": '{"video": "a.mp4", "caption": "long", "caption_short": "short"}'}) / "set.jsonl"
    )
    assert search(str(path)).clips[0].caption == "long"
    assert search(str(path), LabelRules("caption_short")).clips[0].caption == "short"


def test_media_that_are_not_read_are_counted(tmp_path):
    names = ["a.mp4", "b.heic", "c.HEIC", "d.mp4.part", "notes.md", "e.wav", ".hidden.heic", "f.mpg", "g.ts"]
    found = search(str(make(tmp_path, dict.fromkeys(names, ""))))
    assert found.unread == {".heic": 2, ".mp4.part": 1, ".wav": 1}
    assert [Path(clip.path).name for clip in found.clips] == ["a.mp4", "f.mpg", "g.ts"]


def test_shards_in_folders_below(tmp_path):
    in_tar(tmp_path / "one" / "deep", {"a.mp4": "", "a.txt": "an a"})
    assert [clip.caption for clip in search(str(tmp_path)).clips] == ["an a"]


LATIN = "grün".encode("latin-1")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"videos.txt": "a.mp4\nb.mp4\nc.mp4\n", "prompts.txt": "a\nb\n"},
            r"prompts.txt has 2 lines and .*videos.txt 3, but line i of one",
        ),
        (
            {"videos.txt": "a.mp4\n", "prompts.txt": "a\nb\n"},
            r"prompts.txt has 2 lines and .*videos.txt 1, but line i",
        ),
        ({"videos.txt": "a.mp4\n\n", "prompts.txt": "a\nb\n"}, "videos.txt, line 2 is empty, but .*prompts.txt has"),
        ({"videos.txt": "a.mp4\n", "prompts.txt": "a\n", "captions.txt": "b\n"}, "prompts.txt and captions.txt differ"),
        ({"videos.txt": "a.mp4\n", "prompts.txt": LATIN}, "prompts.txt is not UTF-8 text; save it as UTF-8"),
        ({"videos.txt": "a\0.mp4\n".encode("utf-16")}, "videos.txt is not UTF-8 text"),
        ({"metadata.jsonl": b'{"file_name": "' + LATIN}, "metadata.jsonl is not UTF-8 text"),
        ({"metadata.jsonl": '{"file_name": "a.mp4", "captoin": "x"}'}, "line 1: 'captoin' looks like a caption, but"),
        ({"metadata.jsonl": '{"file_name": "a.mp4", "prompt_en": "x"}'}, "line 1: 'prompt_en' looks like a caption"),
        ({"metadata.csv": "file_name,description\na.mp4,x\n"}, "'description' .* set data.params.txt_key: description"),
        (
            {"metadata.csv": "file_name,text\na.mp4,a red ball, rolling\n"},
            "line 2: 3 values for 2 columns; put",
        ),
        ({"metadata.jsonl": '{"file_name": "a.mp4", "text": "x", "prompt": "y"}'}, "'prompt' and 'text' differ"),
        ({"metadata.jsonl": '{"file_name": "a.mp4", "path": "b.mp4"}'}, "'file_name' and 'path' differ"),
        ({"a.json": '{"caption": ["one", "two"]}'}, r"a.json: 'caption' must be text, got \['one', 'two'\]"),
        ({"a.json": '{"title": "a film"}'}, r"a.json: 'title' looks like a caption"),
        ({"a.json": r'{"caption": "so funny \ud83d"}'}, "a.json: 'caption' has half of a character"),
        ({"a.caption": LATIN}, "a.caption is not UTF-8 text"),
        (
            {"metadata.jsonl": '{"file_name": "a\\u0000.mp4", "text": "x"}'},
            "line 1: no file can have the name",
        ),
        ({"metadata.jsonl": '{"file_name": "s3://b/a.mp4", "text": "x"}'}, "line 1: s3://b/a.mp4 is a URL"),
        ({"videos.txt": "a.mp4\nhttps://b/c.mp4\n", "prompts.txt": "a\nb\n"}, "videos.txt, line 2: https://b/c.mp4 is"),
    ],
)
@WRITERS
def test_mistakes_are_named(tmp_path, write, files, message):
    place = write(tmp_path / "set", {"a.mp4": "", "b.mp4": "", "c.mp4": "", **files})
    with pytest.raises(UserError, match=message) as error:
        search(str(place))
    assert "\n" not in str(error.value)


@WRITERS
def test_names_with_accents_in_another_unicode_form(tmp_path, write):
    together, apart = "caf\u00e9", "cafe\u0301"
    files = {f"videos/{apart}.mp4": "", f"labels/{together}.txt": "its label", "videos/\u0130.mp4": ""}
    place = write(tmp_path / "set", {**files, "metadata.jsonl": '{"file_name": "I\u0307.mp4", "text": "listed"}'})
    assert sorted(captions(place)) == [(f"videos/{apart}.mp4", "its label"), ("videos/\u0130.mp4", "listed")]


def test_where_captions_are_not_used_nothing_that_may_hold_some_is_looked_at(tmp_path):
    make(tmp_path, {"a.mp4": "", "a.txt": LATIN, "b.mp4": "", "metadata.csv": "file_name,description\na.mp4,x\n"})
    make(tmp_path, {"set.csv": "video,description\na.mp4,x\n"})
    rules = LabelRules(used=False)
    for place, names in ((tmp_path, ["a.mp4", "b.mp4"]), (tmp_path / "set.csv", ["a.mp4"])):
        clips = search(str(place), rules).clips
        assert [(Path(clip.path).name, clip.caption) for clip in clips] == [(name, None) for name in names]


def test_names_that_people_give_to_labels(tmp_path):
    make(
        tmp_path,
        {"a.mp4": "", "a.mp4.txt": "an a", "B.MOV": "", "B.TXT": "a b", "videos/c.mp4": "", "text/c.txt": "a c"},
    )
    make(tmp_path, {"Videos/d.mp4": "", "Labels/d.txt": "a d"})
    expected = [("B.MOV", "a b"), ("Videos/d.mp4", "a d"), ("a.mp4", "an a"), ("videos/c.mp4", "a c")]
    assert captions(tmp_path) == expected


def test_clips_beside_shards_are_counted(tmp_path):
    in_tar(tmp_path, {"a.mp4": "", "a.txt": "an a"})
    make(tmp_path, {"b.mp4": "", "deep/c.png": "", "notes.txt": ""})
    found = search(str(tmp_path))
    assert [clip.member for clip in found.clips] == ["a.mp4"]
    assert [Path(name).name for name in found.beside] == ["b.mp4", "c.png"]
    with pytest.raises(UserError, match="give its folder"):
        search(str(tmp_path / "notes.txt"))
