"""Sizes of images, from their headers."""

import io

import pytest
from PIL import Image

from cogvideox_sat.files.image_size import image_size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_rotated_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == ((30, 40) if orientation < 5 else (40, 30))


def test_an_orientation_that_does_not_exist_rotates_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 9
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == (30, 40)


def test_open_files_and_damaged_ones():
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    assert image_size(file) == (30, 40)
    with pytest.raises(OSError):
        image_size(io.BytesIO(b"no image"))
