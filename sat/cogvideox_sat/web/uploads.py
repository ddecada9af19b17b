"""Uploaded files in a temporary folder with limits, and copies that videos need.

Nobody opens an upload but the readers of pictures and clips that prompt files have too.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cogvideox_sat.files.atomic import replaced_when_complete, reported_as_user_error
from sgm.errors import UserError

KEPT_UPLOADS = 200  # the oldest are removed first
KEPT_SIZE = 20  # times the size that one may have
INPUTS = "inputs"  # folder beside the videos, of the pictures and clips that they were made from
CHUNK = 2**20


class Uploads:
    """The temporary folder of uploads.

    Args:
        limit: bytes of a file.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.folder = Path(tempfile.mkdtemp(prefix="cogvideox-web-")).resolve()

    def file(self, path: object) -> Path:
        """Return an upload that a page has named.

        Raises:
            UserError: the path leads elsewhere, by `..`, by a link or by itself, or the file is too large.
        """
        missing = UserError("upload: the file is not there, or no longer; choose it again")
        if not isinstance(path, str | os.PathLike) or "\0" in str(path):
            raise missing
        given = Path(path)
        if not is_inside(given, self.folder) or given.is_symlink() or not given.is_file():
            raise missing
        if given.stat().st_size > self.limit:
            raise UserError(f"upload: {given.name} has more than {self.limit // 2**20} MiB; choose a smaller file")
        return given.resolve()

    def adopted(self, path: Path, folder: Path) -> Path:
        """Return a copy, among the uploads, of a file that lies in a folder.

        Raises:
            UserError: it does not, or no longer.
        """
        if path.is_symlink() or not is_inside(path.absolute(), folder) or not path.is_file():
            raise UserError("upload: the file is not there, or no longer; choose it again")
        copy = self.folder / "again" / path.name
        if not copy.is_file():
            copy.parent.mkdir(exist_ok=True)
            with replaced_when_complete(copy) as part:
                shutil.copyfile(path, part)
        return copy

    def prune(self, most: int = KEPT_UPLOADS) -> None:
        """Remove the oldest uploads until number and size are within the limits.

        At most `most` files stay, with at most `KEPT_SIZE` times the limit of one file in all.
        """
        found = []
        for path in self.folder.rglob("*"):
            with suppress(OSError):  # another request has removed it
                if path.is_file():
                    facts = path.stat()
                    found.append((facts.st_mtime_ns, facts.st_size, path))
        room, kept = KEPT_SIZE * self.limit, most
        for _, size, path in sorted(found, key=lambda each: each[0], reverse=True):
            room, kept = room - size, kept - 1
            if room < 0 or kept < 0:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether a path, with its links followed, lies in a folder."""
    try:
        return path.is_absolute() and ".." not in path.parts and path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        return False


def shown_files(fields: Mapping[str, Any]) -> list[Path]:
    """Return the files that the fields of a request name."""
    named = [fields.get("image"), fields.get("video"), *(entry["image"] for entry in fields.get("keyframes") or ())]
    return [Path(each) for each in named if each is not None]


def with_files(fields: Mapping[str, Any], place: Callable[[Path], Path]) -> dict[str, Any]:
    """Return the fields of a request with each file that they name at another place."""
    changed = dict(fields)
    for name in ("image", "video"):
        if changed.get(name) is not None:
            changed[name] = str(place(Path(changed[name])))
    if changed.get("keyframes"):
        changed["keyframes"] = [{**entry, "image": str(place(Path(entry["image"])))} for entry in changed["keyframes"]]
    return changed


def kept_copy(path: Path, folder: Path) -> tuple[Path, bool]:
    """Return the copy of a file that is named by its content, and whether it was made now.

    Raises:
        UserError: it cannot be read or written.
    """
    with reported_as_user_error(path):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    copy = folder / f"{digest.hexdigest()[:32]}{path.suffix.lower()}"
    if copy.is_file() and not copy.is_symlink():
        return copy, False
    with reported_as_user_error(copy):
        folder.mkdir(parents=True, exist_ok=True)
        with replaced_when_complete(copy) as part:
            shutil.copyfile(path, part)
    return copy, True
