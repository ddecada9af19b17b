"""Read a part of a file, such as a member of a tar file, as a file of its own."""

import io
from pathlib import Path


class FilePart(io.RawIOBase):
    """Bytes `start` to `start + size` of the file `path`, read-only.

    Raises:
        OSError: the file is missing, or ends earlier.
    """

    def __init__(self, path: str | Path, start: int, size: int):
        self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115, closed by `close`
        self._start, self._size, self._position = start, size, 0
        there = self._file.seek(0, io.SEEK_END) - start
        if there < size:
            self._file.close()
            raise OSError(f"it ends after {max(there, 0)} of {size} bytes")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # Buffer is of Python 3.12
        self._file.seek(self._start + self._position)
        with memoryview(buffer) as view:
            wanted = max(min(len(view), self._size - self._position), 0)
            count = self._file.readinto(view[:wanted]) if wanted else 0
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
