"""Names and passwords of the page, read from a file or from the environment.

They are never read from the command line, which other users of the machine can see.
"""

import os
from pathlib import Path

from sgm.errors import UserError

VARIABLE = "COGVIDEOX_WEB_AUTH"
SHORTEST = 8  # characters of a password
LARGEST = 2**20  # bytes of a file


def users_of(auth: str | None) -> dict[str, str]:
    """Return names with their passwords.

    Args:
        auth: a file with a line `name:password` for each user; "" for the environment variable `VARIABLE`, which has
            one such line; None: nobody is asked.

    Raises:
        UserError: it cannot be read, or others may read it, or a line is wrong.
    """
    if auth is None:
        return {}
    if auth == "":
        if not (text := os.environ.get(VARIABLE, "").strip()):
            raise UserError(f"auth: {VARIABLE} is not set; set it to name:password, or name a file")
        return read_users(text, VARIABLE)
    path = Path(auth)
    try:
        if path.stat().st_mode & 0o077:
            raise UserError(f"auth: others may read {path}; run: chmod 600 {path}")
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST)
    except OSError as error:
        raise UserError(f"auth: {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"auth: {path} is no text; write name:password, one user a line") from error
    return read_users(text, str(path))


def read_users(text: str, where: str) -> dict[str, str]:
    """Return names with their passwords, from lines `name:password`.

    Raises:
        UserError: a line is wrong, or there is none. No message has a password in it.
    """
    users: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, separator, password = line.strip().partition(":")
        if not separator or not name:
            raise UserError(f"auth: {where}, line {number}: expected name:password")
        if len(password) < SHORTEST:
            raise UserError(f"auth: {where}, line {number}: the password has fewer than {SHORTEST} characters")
        if name in users:
            raise UserError(f"auth: {where}, line {number}: a second {name}; name each once")
        users[name] = password
    if not users:
        raise UserError(f"auth: {where} names nobody; write name:password, one user a line")
    return users
