"""Numbers of bytes: in words, and free on a disk. Nothing here imports PyTorch."""

import shutil
from pathlib import Path

MIB, GIB = 2**20, 2**30


def in_words(size: int) -> str:
    """Return a number of bytes in GiB, or in MiB where it is small."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.2f} MiB"


def free_bytes(path: Path) -> int:
    """Return the bytes that are free where `path` is to be; its folder may not be there, or not any more."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    return shutil.disk_usage(folder).free


def room_in_words(path: Path, needed: int | None) -> str:
    """Return how many bytes are needed, if that is known, and how many are free where `path` is to be."""
    free = f"{in_words(free_bytes(path))} are free"
    return free if needed is None else f"{in_words(needed)} are needed, {free}"
