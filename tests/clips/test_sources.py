"""Test that every clip of a folder, manifest or tar shard is found in a fixed order."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from cogvideox_sat.clips.sources import ClipSource, LabelRules, search
from sgm.errors import UserError
from training_clips import write_tar


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def captions(location, root: Path, **options) -> dict[str, str | None]:
    return {
        str(Path(clip.name).relative_to(root)): clip.caption
        for clip in search(str(location), LabelRules(**options)).clips
    }


def test_the_caption_is_the_first_line_of_the_label_of_the_same_name(tmp_path):
    touch(tmp_path, "videos/b.mp4", "videos/a/c.MOV", "videos/a/d.png", "videos/no label.webm", "videos/empty.mp4")
    write(tmp_path / "labels/b.txt", "  a red ball \nsecond line")
    write(tmp_path / "labels/a/c.txt", "\ufeffein grüner Ball\r\n")
    write(tmp_path / "labels/a/d.txt", "\n\nafter empty lines\n")
    write(tmp_path / "labels/empty.txt", " \n")
    assert list(captions(tmp_path, tmp_path).items()) == [
        ("videos/a/c.MOV", "ein grüner Ball"),
        ("videos/a/d.png", "after empty lines"),
        ("videos/b.mp4", "a red ball"),
        ("videos/empty.mp4", None),
        ("videos/no label.webm", None),
    ]


def test_other_layouts_of_folders(tmp_path):
    touch(tmp_path, "one/videos/a.mp4", "two/videos/a.mp4", "flat/a.mp4", "flat/notes.md", "one/videos/.hidden.mp4")
    write(tmp_path / "one/labels/a.txt", "one")
    write(tmp_path / "two/labels/a.txt", "two")
    write(tmp_path / "flat/a.txt", "flat")
    (tmp_path / "one" / "up").symlink_to(tmp_path)  # a folder that contains itself
    assert captions(tmp_path, tmp_path) == {"flat/a.mp4": "flat", "one/videos/a.mp4": "one", "two/videos/a.mp4": "two"}
    assert captions(tmp_path / "one" / "videos", tmp_path) == {"one/videos/a.mp4": "one"}
    touch(tmp_path, "videos/set/clip.mp4")  # this folder has the name for another reason
    write(tmp_path / "videos/set/clip.txt", "beside")
    assert captions(tmp_path / "videos" / "set", tmp_path) == {"videos/set/clip.mp4": "beside"}
    (tmp_path / "linked").symlink_to(tmp_path / "two")
    assert captions(tmp_path / "linked", tmp_path) == {"linked/videos/a.mp4": "two"}


def test_linked_folders(tmp_path):
    """Each clip counts once, with the captions at the place of the link."""
    touch(tmp_path, "all/a.mp4", "all/b.mp4")
    for split, caption in (("train", "to train"), ("valid", "to hold out")):
        write(tmp_path / split / "labels" / "a.txt", caption)
        (tmp_path / split / "videos").symlink_to(tmp_path / "all")
    assert [(Path(clip.path).name, clip.caption) for clip in search(str(tmp_path)).clips] == [
        ("b.mp4", None),
        ("a.mp4", "to train"),
        ("a.mp4", "to hold out"),
    ]


def test_a_folder_that_cannot_be_looked_into_is_told(tmp_path, monkeypatch, caplog):
    touch(tmp_path, "a.mp4", "closed/b.mp4")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert captions(tmp_path, tmp_path) == {"a.mp4": None}
    assert f"{tmp_path}/closed cannot be read (Permission denied)" in caplog.text


def test_links_in_tar_files(tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("x/a.mp4", b"pixels"), ("/x/b.txt", b"the b"), ("c.txt", b"the c")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        links = (("/x/b.mp4", "x/a.mp4", tarfile.LNKTYPE), ("x/d.mp4", "a.mp4", tarfile.SYMTYPE))
        for name, target, kind in (*links, ("c.mp4", "../away.mp4", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    clips = search(str(tmp_path / "a.tar")).clips
    assert [(clip.member, clip.caption) for clip in clips] == [
        ("x/a.mp4", None),
        ("x/b.mp4", "the b"),
        ("x/d.mp4", None),
    ]
    assert {clip.read() for clip in clips} == {b"pixels"}
    assert "a.tar: clips that are links to files outside are left out: 1, the first is c.mp4" in caplog.text


def test_a_manifest_finds_clips_as_a_list_in_a_folder_does(tmp_path):
    touch(tmp_path, "videos/a.mp4", "videos/e\u0301.mp4", "sub/b.mp4")
    entries = [{"video": "a.mp4"}, {"video": "videos/\u00e9.mp4"}, {"video": "sub\\b.mp4"}, {"video": "none.mp4"}]
    write(tmp_path / "set.jsonl", "\n".join(json.dumps(entry) for entry in entries))
    names = [os.path.relpath(clip.path, tmp_path) for clip in search(str(tmp_path / "set.jsonl")).clips]
    assert names == ["videos/a.mp4", "videos/e\u0301.mp4", "sub/b.mp4", "none.mp4"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_manifests(tmp_path, kind):
    elsewhere = str(tmp_path / "elsewhere" / "b.mp4")
    if kind == "jsonl":
        lines = [{"video": "clips/a.mp4", "caption": "a, \u2028b"}, {"video": elsewhere, "caption": None, "more": 1}]
        text = "\n\n".join(map(json.dumps, lines))
    else:
        text = f'video,more,caption\nclips/a.mp4,,"a, \u2028b"\n{elsewhere},1,\n'
    path = write(tmp_path / "set" / f"clips.{kind}", text)
    expected = {"set/clips/a.mp4": "a, \u2028b", "elsewhere/b.mp4": None}
    assert captions(path, tmp_path) == expected


def test_tar_shards(tmp_path):
    first = write_tar(tmp_path / "set-000.tar", {"x.mp4": b"x" * 700, "x.txt": b"an x\nmore", "x.json": b"{}"})
    second = {"in/y.json": b'{"caption": "a y", "short": "y"}', "in/y.webm": b"yy", "z.md": b"", "z.jpg": b"zz"}
    write_tar(tmp_path / "set-001.tar", second)
    expected = {"set-000.tar/x.mp4": "an x", "set-001.tar/in/y.webm": "a y", "set-001.tar/z.jpg": None}
    for location in (tmp_path, tmp_path / "set-{000..001}.tar", tmp_path / "set-*.tar"):
        assert captions(location, tmp_path) == expected
    assert captions(tmp_path, tmp_path, txt_key="short")["set-001.tar/in/y.webm"] == "y"
    (clip,) = search(str(first)).clips
    assert clip.read() == b"x" * 700


def test_of_a_cut_off_shard_the_whole_clips_are_used(tmp_path, caplog):
    whole = write_tar(tmp_path / "whole.tar", {f"{i}.mp4": bytes([i]) * 3000 for i in range(4)})
    cut = write(tmp_path / "cut.tar", whole.read_bytes()[:9000])
    assert [clip.member for clip in search(str(cut)).clips] == ["0.mp4", "1.mp4"]
    assert "cut.tar: damaged or cut off" in caplog.text


def test_reading_a_member_of_a_file_that_has_shrunk_is_an_error(tmp_path):
    path = write(tmp_path / "a.tar", b"short")
    with pytest.raises(OSError, match="ends after 3 of 9 bytes"):
        ClipSource(str(path), None, "a.mp4", 2, 9).read()


def test_mistakes_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "packed/part1.ZIP")
    compressed = tmp_path / "a.tar.gz"
    with tarfile.open(compressed, "w:gz"):
        pass
    touch(tmp_path, "clips.parquet", "bad/videos/a.mp4")
    write(tmp_path / "bad/labels/a.txt", "grün".encode("latin-1"))
    no_caption_text = write(tmp_path / "number.jsonl", '{"video": "a.mp4", "caption": 3}')
    for location, message in {
        "empty": ".*empty: no videos found; expected files such as videos/name.mp4",
        "packed": ".*packed: no videos found; unpack .*packed/part1.ZIP first",
        "none": "none does not exist",
        "none-{0..3}.tar": "none-0.tar does not exist",
        "none-*.tar": "no file matches",
        "clips.parquet": "is not a folder or a .jsonl, .csv or .tar file",
        "a.tar.gz": "compressed tar files",
        "bad": "labels/a.txt is not UTF-8",
        write(tmp_path / "a.jsonl", '\n{"video": 3}').name: "a.jsonl, line 2: 'video' must be the path",
        write(tmp_path / "b.jsonl", "{").name: "b.jsonl, line 1: not valid JSON",
        write(tmp_path / "c.jsonl", "[]").name: "c.jsonl, line 1: expected an object",
        write(tmp_path / "d.jsonl", "").name: ".*d.jsonl: no videos found",
        no_caption_text.name: "number.jsonl, line 1: 'caption' must be text",
        write(tmp_path / "a.csv", "file,caption\na.mp4,a").name: "a.csv: the first line must name the columns",
        write_tar(tmp_path / "text.tar", {"a.txt": b"a"}).name: ".*text.tar: no videos found",
        write_tar(tmp_path / "json.tar", {"a.json": b"{", "a.mp4": b""}).name: "json.tar/a.json: not valid JSON",
        write(tmp_path / "nothing.tar", b"").name: ".*nothing.tar: no videos found",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            search(str(tmp_path / location))
        assert "\n" not in str(error.value)
    for location in ("https://host/a.tar", "pipe:cat a.tar", "s3://bucket/{000..010}.tar"):
        with pytest.raises(UserError, match="download them, or mount"):
            search(location)


def test_an_empty_place_is_not_the_current_folder():
    with pytest.raises(UserError, match="a path is empty"):
        search("")


def test_pytorch_is_not_imported():
    code = "import sys; from cogvideox_sat.clips import batch_order, sources; "
    code += "from cogvideox_sat.media import packet_window, video_reading; sys.exit('torch' in sys.modules)"
    folders = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "sat")]
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(folders)})


def test_names_and_patterns_may_be_too_long_for_the_file_system(tmp_path):
    names = [f"a-long-name-of-a-shard-{number:06d}" for number in range(12)]
    for name in names:
        write_tar(tmp_path / f"{name}.tar", {"a.mp4": b"video", "a.txt": b"a cat"})
    pattern = tmp_path / ("{" + ",".join(names) + "}.tar")
    assert len(pattern.name) > 255
    assert len(search(str(pattern)).clips) == 12
    with pytest.raises(UserError, match=r"a+ cannot be read: File name too long; shorten it$"):
        search(str(tmp_path / ("a" * 300)))


def test_hidden_files_are_no_shards(tmp_path, caplog):
    """Copies from macOS have notes such as `._a.tar` beside each file."""
    write_tar(tmp_path / "a.tar", {"a.mp4": b"video", "a.txt": b"a cat"})
    (tmp_path / "._a.tar").write_bytes(b"notes")
    assert len(search(str(tmp_path)).clips) == 1
    assert not caplog.records


def test_captions_that_may_not_be_read_are_named(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", {"a.mp4": b"video"})
    (tmp_path / "a.meta.jsonl").write_text("{}")
    read_bytes = Path.read_bytes

    def refuse(path):
        if path.name == "a.meta.jsonl":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot read .*a\.meta\.jsonl: Permission denied; change the permissions or"):
        search(str(tmp_path / "a.tar"))


def test_a_folder_of_labels_that_may_not_be_read_is_a_warning(tmp_path, monkeypatch, caplog):
    for name in ("videos/a.mp4", "labels/a.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("a cat")
    listdir = os.listdir

    def refuse(path):
        if Path(path).name == "labels":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    (clip,) = search(str(tmp_path / "videos")).clips
    assert clip.caption is None
    assert f"{tmp_path}/labels cannot be read (Permission denied); its content is left out" in caplog.text
