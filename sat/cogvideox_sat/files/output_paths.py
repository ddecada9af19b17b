"""Name the files of sampled videos and check that they can be written.

Nothing here imports PyTorch, so that mistakes are reported at once.
"""

import os
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from cogvideox_sat.files.refusals import refusal
from sgm.errors import UserError

# Illegal on some file systems, or special in a shell (typographic quotes included).
_NOT_IN_NAMES = frozenset("/\\:*?<>|\"'`\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb")


def safe_name(text: str, limit: int = 120) -> str:
    """Return `text` as the name of a file or folder that is legal on every file system.

    White space becomes `_`. Slashes, quotes, wildcards, control characters and characters that the file system cannot
    encode are removed. Letters of all scripts and emoji are kept. The name is not empty, has no leading or trailing
    dot, and has at most `limit` bytes of UTF-8.
    """
    encoding = sys.getfilesystemencoding()
    kept = []
    for char in unicodedata.normalize("NFC", text.strip()):
        if char.isspace():
            kept.append("_")
        elif char not in _NOT_IN_NAMES and unicodedata.category(char)[0] != "C" and char.encode(encoding, "ignore"):
            kept.append(char)
    # A character that is cut in two is removed.
    name = "".join(kept).lstrip(".").encode()[:limit].decode(errors="ignore")
    return name.rstrip("._") or "unnamed"


def output_path(output_dir: str | Path, n: int, prompt: str, sample_index: int) -> Path:
    """Return the path of a sampled video: `output_dir/{n}_{prompt}/{sample_index}/000000.mp4`.

    The prompt is turned into a safe name.
    """
    return Path(output_dir) / f"{n}_{safe_name(prompt)}" / str(sample_index) / "000000.mp4"


def decide_existing(
    path: Path, overwrite: bool, skip_existing: bool, beside: Mapping[Path, str] = MappingProxyType({})
) -> bool:
    """Return whether to write `path`; False if it exists and is to be kept.

    Args:
        beside: files that belong to `path`, and what they are. If one exists without `path`, it is replaced, but only
            if the flags allow it.

    Raises:
        UserError: `path` or one of `beside` exists, and neither flag is set.
    """
    if overwrite:
        return True
    if path.exists():
        if skip_existing:
            return False
        raise UserError(f"{path} exists; give --overwrite to replace it or --skip_existing to keep it")
    for other, what in beside.items():
        if other.exists() and not skip_existing:
            raise UserError(f"{other} exists, {what}; give --overwrite to replace it or another --output_dir")
    return True


def check_sheet(path: str) -> None:
    """Check that `contact_sheet` names a PNG that can be written.

    Raises:
        UserError: the name is not that of a PNG, or its folder cannot be written to.
    """
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"contact_sheet: got {path}; expected a name that ends with .png")
    check_file(path, "contact_sheet")


def check_file(path: str | Path, argument: str) -> None:
    """Check that a file can be written to `path`, whose folder need not exist yet.

    Raises:
        UserError: about `argument`: it cannot.
    """
    if os.path.isdir(path):  # noqa: PTH112, `Path.is_dir` may raise
        raise UserError(f"{argument}: {path} is a folder; name a file")
    nearest_existing(Path(path), argument)  # refuses a name that is too long
    check_folder(Path(path).parent, argument)


def check_folder(folder: str | Path, argument: str = "output_dir") -> None:
    """Check that files can be written to `folder`, which need not exist yet.

    Raises:
        UserError: about `argument`: they cannot.
    """
    folder = Path(folder)
    nearest = nearest_existing(folder, argument)
    if not os.path.isdir(nearest):  # noqa: PTH112, `Path.is_dir` may raise
        raise UserError(f"{argument}: {folder}: {nearest} is not a folder; name another path")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(
            f"{argument}: {folder}: no permission to write to {nearest}; change its permissions or name another folder"
        )


def nearest_existing(path: Path, argument: str) -> Path:
    """Return the path, or the nearest path above it that exists, even a broken link.

    Raises:
        UserError: about `argument`: the name is too long, or a folder above may not be searched.
    """
    for candidate in (path, *path.absolute().parents):
        try:
            candidate.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserError(f"{argument}: {path}: {refusal(error)}") from error
        return candidate
    return Path(path.anchor)
