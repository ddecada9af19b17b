"""Where sampled videos go and what they are called. Nothing here imports PyTorch, so that names are settled first."""

import os
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from sgm.errors import UserError

# Illegal on some file system, or a nuisance in a shell (typographic quotes included).
_NOT_IN_NAMES = frozenset("/\\:*?<>|\"'`\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb")


def safe_name(text: str, limit: int = 120) -> str:
    """`text` as the name of a file or folder: legal on every file system, at most `limit` bytes of UTF-8.

    White space becomes `_`; slashes, quotes, wildcards, control characters and what the file system cannot encode are
    left out; letters of any script and emoji stay. Never empty, never hidden (leading dot), no trailing dot.
    """
    encoding = sys.getfilesystemencoding()
    kept = []
    for char in unicodedata.normalize("NFC", text.strip()):
        if char.isspace():
            kept.append("_")
        elif char not in _NOT_IN_NAMES and unicodedata.category(char)[0] != "C" and char.encode(encoding, "ignore"):
            kept.append(char)
    name = "".join(kept).lstrip(".").encode()[:limit].decode(errors="ignore")  # a character cut in two goes as a whole
    return name.rstrip("._") or "unnamed"


def output_path(output_dir: str | Path, n: int, prompt: str, sample_index: int) -> Path:
    """`output_dir/{n}_{prompt}/{sample_index}/000000.mp4`, the prompt made safe: the file of one sampled video."""
    return Path(output_dir) / f"{n}_{safe_name(prompt)}" / str(sample_index) / "000000.mp4"


def decide_existing(
    path: Path, overwrite: bool, skip_existing: bool, beside: Mapping[Path, str] = MappingProxyType({})
) -> bool:
    """Return whether to write `path`: False when it exists and is to be kept.

    Args:
        beside: files that belong to `path`, with what they are. One that exists without `path` is replaced too, but not
            without being asked.

    Raises:
        UserError: it, or one of `beside`, exists and neither flag says what to do.
    """
    if overwrite:
        return True
    if path.exists():
        if skip_existing:
            return False
        raise UserError(f"{path} exists: give --overwrite to replace it or --skip_existing to keep it")
    for other, what in beside.items():
        if other.exists() and not skip_existing:
            raise UserError(f"{other} exists, {what}: give --overwrite to replace it or another --output_dir")
    return True


def check_sheet(path: str) -> None:
    """Check that `contact_sheet` names a PNG that can be written.

    Raises:
        UserError: the name is no PNG, or its folder cannot be written to.
    """
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"contact_sheet is {path}; the name of a PNG ends with .png")
    check_folder(Path(path).parent, "contact_sheet")


def check_folder(folder: str | Path, argument: str = "output_dir") -> None:
    """Raises UserError, about `argument`, if files cannot be put into `folder`, which need not exist yet."""
    folder = Path(folder)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"{argument} {folder}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{argument} {folder}: no permission to write to {nearest}")
