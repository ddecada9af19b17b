"""Entries of a folder are offered by name, and nothing outside can be reached."""

import pytest

from cogvideox_sat.web.shelves import Shelf
from sgm.errors import UserError


@pytest.fixture
def shelf(tmp_path) -> Shelf:
    root = tmp_path / "root"
    (root / "run" / "samples").mkdir(parents=True)
    (root / "run" / "samples" / "0.mp4").write_bytes(b"video")
    (root / "a.txt").write_text("a")
    (root / ".hidden").write_text("hidden")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file.mp4").write_text("secret")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "run" / "link").symlink_to(tmp_path / "secret")
    (root / "run" / "samples" / "link.mp4").symlink_to(tmp_path / "secret" / "file.mp4")
    return Shelf(root, "thing")


def test_offers_what_is_no_link_and_not_hidden(shelf):
    assert shelf.names() == ["a.txt", "run"]
    assert shelf.path("a.txt").read_text() == "a"


def test_offers_only_what_fits(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.mp4").touch()
    shelf = Shelf(tmp_path, "video", lambda path: path.suffix == ".mp4")
    assert shelf.names() == ["b.mp4"]
    with pytest.raises(UserError, match=r"video: 'a\.txt' does not exist; choose one of the list"):
        shelf.path("a.txt")


@pytest.mark.parametrize(
    "name",
    ["../secret", "..", ".", "", "link", "/etc/passwd", "run/samples", ".hidden", "run\\x", "a\0", None, 7, ["a"]],
)
def test_names_nothing_outside(shelf, name):
    with pytest.raises(UserError, match=r"thing: .* does not exist"):
        shelf.path(name)


@pytest.mark.parametrize(
    "inner",
    [
        ("link", "file.mp4"),
        ("samples", "link.mp4"),
        ("..", "..", "secret", "file.mp4"),
        ("samples",),
        ("samples", "9.mp4"),
    ],
)
def test_finds_no_file_outside(shelf, inner):
    with pytest.raises(UserError, match="does not exist"):
        shelf.file("run", *inner)


def test_finds_a_file_inside(shelf):
    assert shelf.file("run", "samples", "0.mp4").read_bytes() == b"video"


def test_is_empty_without_a_folder(tmp_path):
    assert Shelf(None, "thing").names() == Shelf(tmp_path / "missing", "thing").names() == []
    with pytest.raises(UserError):
        Shelf(None, "thing").path("a")
