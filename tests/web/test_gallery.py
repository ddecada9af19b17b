"""The gallery reads what was written, newest first, and what made it."""

import json
import os
from datetime import datetime

import pytest

from cogvideox_sat.web.gallery import Gallery
from sgm.errors import UserError

RECORD = {
    "format": 1, "prompt": "a kite", "negative_prompt": "", "image": None, "seed": 7, "index": 0, "steps": 3,
    "size": [64, 64], "latent_frames": 3, "fps": 8, "precision": "float32", "checkpoint": None,
    "adapters": [{"path": "/adapters/style", "scale": 0.5}], "model": {}, "arguments": {"guidance_scale": 5},
    "versions": {}, "device": "cpu", "threads": 1,
}  # fmt: skip


@pytest.fixture
def gallery(tmp_path) -> Gallery:
    for number, name in enumerate(("old", "new")):
        (tmp_path / f"{name}.mp4").touch()
        os.utime(tmp_path / f"{name}.mp4", (number, number))
    (tmp_path / "new.json").write_text(json.dumps(RECORD))
    return Gallery(tmp_path)


def test_videos_come_newest_first(gallery):
    assert gallery.names() == ["new.mp4", "old.mp4"]
    assert [entry.name for entry in gallery.entries(1)] == ["new.mp4"]


def test_a_record_tells_what_made_a_video(gallery):
    entry = gallery.entry("new.mp4")
    assert (entry.prompt, entry.fields["seed"], entry.fields["guidance_scale"]) == ("a kite", 7, 5)
    assert entry.adapters == {"/adapters/style": 0.5}


@pytest.mark.parametrize("text", ["", "{}", "[1", '{"format": 1}', '{"format": 2}'])
def test_a_video_whose_record_is_none_is_shown_all_the_same(gallery, text):
    (gallery.folder / "old.json").write_text(text)
    entry = gallery.entry("old.mp4")
    assert (entry.name, entry.prompt, entry.fields) == ("old.mp4", "", {})


def test_links_are_not_shown_and_not_read(gallery, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.mp4").touch()
    (outside / "secret.json").write_text(json.dumps(RECORD))
    (gallery.folder / "link.mp4").symlink_to(outside / "secret.mp4")
    (gallery.folder / "old.json").symlink_to(outside / "secret.json")
    assert "link.mp4" not in gallery.names()
    assert gallery.entry("old.mp4").prompt == ""
    with pytest.raises(UserError, match=r"video: 'link\.mp4' does not exist"):
        gallery.entry("link.mp4")


def test_new_names_differ_and_sort_by_time(gallery):
    now = datetime(2030, 1, 2, 3, 4, 5)
    names = {gallery.new_path(now).name for _ in range(20)}
    assert len(names) == 20
    assert all(name.startswith("20300102-030405-") and name.endswith(".mp4") for name in names)


def test_a_folder_that_does_not_exist_yet_is_empty(tmp_path):
    assert Gallery(tmp_path / "later").entries() == []
