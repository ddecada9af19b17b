"""Test that images of all kinds become (3, height, width) in [-1, 1], upright and centred."""

import numpy as np
import pytest
import torch
from PIL import Image

from cogvideox_sat.media.image_inputs import load_condition_image
from sgm.errors import UserError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def colours(*rows: list) -> Image.Image:
    """Return an image of 8x8-pixel squares of the given colours."""
    return Image.fromarray(np.kron(np.array(rows, np.uint8), np.ones((8, 8, 1), np.uint8)))


def centre(frame: torch.Tensor, row: int, column: int, rows: int, columns: int) -> list[int]:
    """Return the colour at the centre of one cell of a grid of rows x columns, in 0..255."""
    height, width = frame.shape[1:]
    pixel = frame[:, (2 * row + 1) * height // (2 * rows), (2 * column + 1) * width // (2 * columns)]
    return ((pixel + 1) * 127.5).round().int().tolist()


def test_values_shape_and_dtype(tmp_path):
    colours([RED, GREEN], [BLUE, (255, 255, 255)]).save(tmp_path / "a.png")
    frame = load_condition_image(tmp_path / "a.png", (32, 32))
    assert frame.shape == (3, 32, 32)
    assert frame.dtype == torch.float32
    assert (frame.min(), frame.max()) == (-1, 1)
    assert [centre(frame, r, c, 2, 2) for r in (0, 1) for c in (0, 1)] == [[*RED], [*GREEN], [*BLUE], [255] * 3]


@pytest.mark.parametrize(
    ("image", "expected"),
    [(colours([RED, GREEN, BLUE]), [*GREEN]), (colours([RED], [GREEN], [BLUE]), [*GREEN])],
    ids=["wide", "tall"],
)
def test_what_protrudes_is_cut_off_evenly(tmp_path, image, expected):
    image.save(tmp_path / "a.png")
    frame = load_condition_image(tmp_path / "a.png", (24, 24))
    assert [centre(frame, 1, 1, 3, 3), centre(frame, 0, 0, 3, 3), centre(frame, 2, 2, 3, 3)] == [expected] * 3


def test_aspect_ratio_is_kept(tmp_path):
    """A square stays square in another shape: 24x48 from 48x48 keeps the middle rows."""
    colours([RED, RED], [RED, RED], [GREEN, BLUE], [GREEN, BLUE]).resize((48, 48), 0).save(tmp_path / "a.png")
    frame = load_condition_image(tmp_path / "a.png", (24, 48))
    assert frame.shape == (3, 24, 48)
    assert [centre(frame, r, c, 2, 2) for r in (0, 1) for c in (0, 1)] == [[*RED], [*RED], [*GREEN], [*BLUE]]


def test_downscaling_is_antialiased(tmp_path):
    """A one-pixel checkerboard becomes grey; sampling single pixels would give stripes."""
    board = np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255
    Image.fromarray(board).save(tmp_path / "a.png")
    assert load_condition_image(tmp_path / "a.png", (20, 20)).abs().max() < 0.2


def test_exif_orientation_is_respected(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated to the left; rotate to the right by 90 degrees
    colours([RED, GREEN, BLUE]).save(tmp_path / "a.png", exif=exif)
    frame = load_condition_image(tmp_path / "a.png", (24, 8))
    assert [centre(frame, r, 0, 3, 1) for r in range(3)] == [[*RED], [*GREEN], [*BLUE]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_gives_white_for_white(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 65535, np.uint16))
    else:
        image = Image.new("RGB", (8, 8), "white").convert(mode)
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image.save(path)
    assert Image.open(path).mode == mode
    assert (load_condition_image(path, (8, 8)) == 1).all()


def test_sixteen_bit_greys_are_scaled(tmp_path):
    Image.fromarray(np.full((8, 8), 0x8080, np.uint16)).save(tmp_path / "a.png")
    assert centre(load_condition_image(tmp_path / "a.png", (8, 8)), 0, 0, 1, 1) == [128, 128, 128]


def test_transparent_parts_are_white_whatever_colour_hides_there(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert (load_condition_image(tmp_path / "a.png", (8, 8)) == 1).all()


def test_missing_unreadable_and_truncated_images_are_named(tmp_path):
    noise = np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg"):
        whole = tmp_path / f"whole.{suffix}"
        Image.fromarray(noise).save(whole)
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(UserError, match=f"cannot read the image {cut}"):
            load_condition_image(cut, (8, 8))
    (tmp_path / "text.png").write_text("no image")
    for name, message in (("text.png", "cannot read the image {}"), ("none.png", "^image {} does not exist$")):
        with pytest.raises(UserError, match=message.format(tmp_path / name)):
            load_condition_image(tmp_path / name, (8, 8))


def test_damage_that_pillow_does_not_expect_is_one_line(tmp_path):
    path = tmp_path / "a.dds"
    Image.new("RGB", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[80:84] = bytes(4)  # the flags of the pixel format
    path.write_bytes(content)
    with pytest.raises(NotImplementedError), Image.open(path):
        pass
    with pytest.raises(UserError, match=f"^cannot read the image {path}: Unknown .*; save it again, as PNG or JPEG$"):
        load_condition_image(path, (8, 8))
    with pytest.raises(UserError, match=f"^cannot read the image {tmp_path}: Is a directory; name a file$"):
        load_condition_image(tmp_path, (8, 8))
