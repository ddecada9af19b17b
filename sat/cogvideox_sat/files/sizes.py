"""Write numbers of bytes in words, and count the free bytes of a disk.

Nothing here imports PyTorch.
"""

import shutil
from pathlib import Path

MIB, GIB = 2**20, 2**30


def in_words(size: int) -> str:
    """Return a number of bytes in GiB, or in MiB if it is small."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.2f} MiB"


def in_units(size: float) -> str:
    """Return a number of bytes with three or four digits in its largest unit, such as 1.5 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that `path` is on; its folder need not exist."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    return shutil.disk_usage(folder).free


def room_in_words(path: Path, needed: int | None) -> str:
    """Return in words how many bytes are needed, if known, and free on the disk of `path`."""
    free = f"{in_words(free_bytes(path))} are free"
    return free if needed is None else f"{in_words(needed)} are needed, {free}"
