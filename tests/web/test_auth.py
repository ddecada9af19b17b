"""Names and passwords come from a file that others cannot read, or from the environment."""

import pytest

from cogvideox_sat.web.auth import VARIABLE, users_of
from sgm.errors import UserError


def written(path, text, mode=0o600):
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_users_of_a_file(tmp_path):
    file = written(tmp_path / "users", "# people\nann:long:password\n\nbo:another one\n")
    assert users_of(file) == {"ann": "long:password", "bo": "another one"}


def test_the_user_of_the_environment(monkeypatch):
    monkeypatch.setenv(VARIABLE, "ann:long password")
    assert users_of("") == {"ann": "long password"}


def test_nobody_is_asked():
    assert users_of(None) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names nobody"),
        ("ann", "line 1: expected name:password"),
        (":long password", "line 1: expected name:password"),
        ("ann:secret1", "line 1: the password has fewer than 8 characters"),
        ("ann:long password\nann:secret password", "line 2: a second ann"),
    ],
)
def test_a_wrong_line_is_told_without_its_password(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        users_of(written(tmp_path / "users", text))
    assert str(error.value).startswith("auth: ")
    assert "secret" not in str(error.value)


def test_a_file_that_others_may_read_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"auth: others may read .*; run: chmod 600"):
        users_of(written(tmp_path / "users", "ann:long password", 0o644))


def test_a_missing_file_and_a_missing_variable(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(UserError, match=f"auth: {VARIABLE} is not set; set it to name:password"):
        users_of("")
    with pytest.raises(UserError, match=r"auth: .*missing cannot be read"):
        users_of(str(tmp_path / "missing"))
