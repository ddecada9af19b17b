"""Test the file `latest` with content of any kind."""

import pytest

from cogvideox_sat.files.latest_file import newest
from sgm.errors import UserError


def test_it_names_a_checkpoint_beside_it(tmp_path):
    assert newest(tmp_path, "load") is None
    (tmp_path / "latest").write_text(" step=20.ckpt\n")
    assert newest(tmp_path, "load") == "step=20.ckpt"


@pytest.mark.parametrize(
    "content",
    [b"", b"..", b".", b"/etc", b"../other/20", b"20/", b"1\n2", b"a\0b", b"\x1b[31m", b"2" * 5000, b"\xff\xfe"],
)
def test_anything_else_is_an_error_of_the_argument(tmp_path, content):
    (tmp_path / "latest").write_bytes(content)
    with pytest.raises(UserError, match=r"^resume: .*latest .*; write the name of a checkpoint"):
        newest(tmp_path, "resume")
