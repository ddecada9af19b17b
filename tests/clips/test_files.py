"""Test that names and content tell videos, images and other files apart."""

import io
from pathlib import Path

import pytest
from PIL import Image

from cogvideox_sat.clips.files import ClipSource, unread_kind
from training_clips import write_tar

MOVING = {"gif": "GIF", "webp": "WEBP", "png": "PNG", "apng": "PNG"}


def picture(kind: str, frames: int, mode: str = "RGB") -> bytes:
    images = [Image.new(mode, (40, 30), colour) for colour in (0, 80, 160)[:frames]]
    content = io.BytesIO()
    images[0].save(content, MOVING[kind], save_all=frames > 1, append_images=images[1:])
    return content.getvalue()


@pytest.mark.parametrize("kind", MOVING)
def test_pictures_that_move_are_videos(tmp_path, kind):
    members = {f"moves.{kind}": picture(kind, 3), f"still.{kind}": picture(kind, 1)}
    shard = write_tar(tmp_path / "a.tar", members)
    for name, content in members.items():
        (tmp_path / name).write_bytes(content)
        is_image = name.startswith("still")
        assert ClipSource(str(tmp_path / name), None).is_image == is_image
        start = shard.read_bytes().index(content)
        assert ClipSource(str(shard), None, name, start, len(content)).is_image == is_image


def test_without_a_table_of_colours_too(tmp_path):
    (tmp_path / "a.gif").write_bytes(picture("gif", 2, "L"))
    (tmp_path / "b.webp").write_bytes(picture("webp", 1, "RGBA"))
    assert not ClipSource(str(tmp_path / "a.gif"), None).is_image
    assert ClipSource(str(tmp_path / "b.webp"), None).is_image


@pytest.mark.parametrize("kind", MOVING)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_what_is_cut_off_or_something_else_is_a_picture(tmp_path, kind, share):
    content = picture(kind, 1)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content[: int(len(content) * share)])
    assert ClipSource(str(path), None).is_image
    path.write_bytes(b"something else, that is longer than any header")
    assert ClipSource(str(path), None).is_image


def test_names():
    assert not ClipSource("a.MPG", None).is_image
    assert ClipSource("a.JPG", None).is_image
    assert ClipSource("gone.gif", None).is_image
    kinds = {"a.heic": ".heic", "a.mp4.part": ".mp4.part", "a.mp4": None, "a.txt": None, "a.part": None, "mp4": None}
    assert {name: unread_kind(Path(name).name) for name in kinds} == kinds
