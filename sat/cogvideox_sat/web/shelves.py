"""Folders whose content the page offers by name. A page names nothing by a path."""

import os
from collections.abc import Callable
from pathlib import Path

from sgm.errors import UserError, shown


class Shelf:
    """A folder, and which of the files and folders in it the page offers.

    Links are not offered, wherever they lead, and neither are names that begin with a dot.

    Args:
        root: the folder, which need not exist yet.
        what: what its content is called in messages.
        fits: whether a file or folder in it is offered.
    """

    def __init__(self, root: Path | None, what: str, fits: Callable[[Path], bool] = lambda path: True):
        self.root, self.what, self._fits = root, what, fits

    def names(self) -> list[str]:
        """Return what is offered, in the order of the names."""
        if self.root is None:
            return []
        try:
            with os.scandir(self.root) as entries:
                found = [entry.name for entry in entries if not entry.is_symlink() and is_plain(entry.name)]
        except OSError:
            return []
        return sorted(name for name in found if self._fits(self.root / name))

    def path(self, name: object) -> Path:
        """Return the file or folder of a name.

        Raises:
            UserError: none that is offered has the name.
        """
        if self.root is not None and isinstance(name, str) and is_plain(name):
            path = self.root / name
            if not path.is_symlink() and path.exists() and self._fits(path):
                return path
        raise UserError(f"{self.what}: {shown(name)} does not exist; choose one of the list")

    def file(self, name: str, *inner: str) -> Path:
        """Return a file in a folder of a name, without following a link.

        Args:
            inner: the names that lead to it, one for each folder.

        Raises:
            UserError: it does not exist, is no file, or a link is on the way.
        """
        path = self.path(name)
        for each in inner:
            path = path / each
            if not is_plain(each) or path.is_symlink():
                raise UserError(f"{self.what}: {shown(each)} does not exist; choose one of the list")
        if not path.is_file():
            raise UserError(f"{self.what}: {shown(path.name)} does not exist; choose one of the list")
        return path


def is_plain(name: str) -> bool:
    """Return whether a text names something in a folder, rather than a path, and can be shown."""
    if not name or name.startswith(".") or len(name) > 255:
        return False
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are no text
        return False
    return not any(character in name for character in "/\\") and name.isprintable()
