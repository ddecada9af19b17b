"""Test that what the system refuses is told with a remedy."""

import errno
import os

import pytest

from cogvideox_sat.files import refusals
from cogvideox_sat.files.refusals import refusal, why_unreadable


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "; change the permissions or name another path"),
        (errno.ENOSPC, "; make room"),
        (errno.ENAMETOOLONG, "; shorten it"),
        (errno.EIO, ""),
    ],
)
def test_reasons_come_with_a_remedy_if_there_is_one(number, remedy):
    assert refusal(OSError(number, os.strerror(number))) == os.strerror(number) + remedy
    assert refusal(OSError("of a library")) == "of a library"


def test_what_can_be_read_or_does_not_exist_has_no_reason(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file", tmp_path / "gone", tmp_path / "file" / "below", "a\0b"):
        assert why_unreadable(path) is None


def test_what_exists_and_cannot_be_read_has_a_reason(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to("loop")
    assert why_unreadable(tmp_path / ("a" * 300)) == "File name too long; shorten it"
    assert why_unreadable(tmp_path / "loop") == "Too many levels of symbolic links"
    monkeypatch.setattr(refusals.os, "access", lambda path, mode: not mode & os.X_OK)  # of files only
    assert why_unreadable(tmp_path) == "Permission denied; change the permissions or name another path"
