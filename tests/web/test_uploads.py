"""Uploads lie in a folder of their own; nothing else is taken for one."""

import pytest

from cogvideox_sat.web.uploads import Uploads, kept_copy, shown_files, with_files
from sgm.errors import UserError


@pytest.fixture
def uploads():
    uploads = Uploads(10)
    yield uploads
    uploads.close()
    assert not uploads.folder.exists()


def test_an_upload_is_found(uploads):
    file = uploads.folder / "hash" / "picture.png"
    file.parent.mkdir()
    file.write_bytes(b"picture")
    assert uploads.file(str(file)) == file
    assert uploads.folder.stat().st_mode & 0o077 == 0, "others of this machine do not look into it"


def test_nothing_else_is_an_upload(uploads, tmp_path):
    outside = tmp_path / "secret.png"
    outside.write_bytes(b"secret")
    link = uploads.folder / "link.png"
    link.symlink_to(outside)
    folder = uploads.folder / "folder"
    folder.symlink_to(tmp_path)
    wrong = [outside, link, folder / "secret.png", f"{uploads.folder}/../{outside.name}", "/etc/passwd", "secret.png"]
    for path in [*wrong, uploads.folder, uploads.folder / "missing", "http://127.0.0.1/x.png", "a\0b", None, 7, {}]:
        with pytest.raises(UserError, match="upload: the file is not there"):
            uploads.file(path if not hasattr(path, "parts") else str(path))


def test_one_that_is_too_large_is_refused(uploads):
    file = uploads.folder / "large.png"
    file.write_bytes(b"x" * 11)
    with pytest.raises(UserError, match=r"upload: large\.png has more than 0 MiB; choose a smaller file"):
        uploads.file(file)


def test_the_oldest_are_removed(uploads):
    import os

    for number in range(4):
        file = uploads.folder / f"{number}.png"
        file.touch()
        os.utime(file, (number, number))
    uploads.prune(most=2)
    assert sorted(path.name for path in uploads.folder.iterdir()) == ["2.png", "3.png"]


def test_no_more_is_kept_than_there_is_room_for(uploads):
    for number in range(30):
        (uploads.folder / f"{number}.png").write_bytes(b"x" * 10)
        uploads.prune()
    assert len(list(uploads.folder.iterdir())) == 20
    assert (uploads.folder / "29.png").exists()


def test_what_a_video_was_made_from_becomes_an_upload_again(uploads, tmp_path):
    kept = tmp_path / "inputs"
    kept.mkdir()
    (kept / "a.png").write_bytes(b"a")
    assert uploads.file(uploads.adopted(kept / "a.png", kept)).read_bytes() == b"a"


def test_nothing_outside_becomes_an_upload(uploads, tmp_path):
    kept = tmp_path / "inputs"
    kept.mkdir()
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    (kept / "link.png").symlink_to(secret)
    for path in (secret, kept / "link.png", kept / ".." / "secret.png", kept / "missing.png"):
        with pytest.raises(UserError, match="upload: the file is not there"):
            uploads.adopted(path, kept)
    assert list(uploads.folder.rglob("*.png")) == []


def test_files_of_a_request_are_found_and_moved(tmp_path):
    fields = {"prompt": "p", "image": "/a", "video": "/b", "keyframes": [{"image": "/c", "at": -1}]}
    assert [str(path) for path in shown_files(fields)] == ["/a", "/b", "/c"]
    moved = with_files(fields, lambda path: tmp_path / path.name)
    assert moved["keyframes"] == [{"image": str(tmp_path / "c"), "at": -1}]
    assert (moved["image"], moved["prompt"], fields["image"]) == (str(tmp_path / "a"), "p", "/a")


def test_a_copy_is_kept_once(tmp_path):
    file = tmp_path / "a.PNG"
    file.write_bytes(b"a")
    copy, is_new = kept_copy(file, tmp_path / "inputs")
    assert (copy.read_bytes(), copy.suffix, is_new) == (b"a", ".png", True)
    assert kept_copy(file, tmp_path / "inputs") == (copy, False)
    assert len(list((tmp_path / "inputs").iterdir())) == 1
