"""Tensors that lie in files: their names, shapes and dtypes at once, their values when they are asked for.

A file is mapped, and what was read of it stays in memory as long as the map does. Maps are therefore renewed as tensors
go by, so that a checkpoint of any size is converted in the memory of a few of its tensors.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor

from sgm.errors import UserError
from sgm.weights import INDEX_SUFFIX, module_weights, read_state_dict, read_weight_map

WINDOW_BYTES = 128 * 2**20  # that may be read through one map


@dataclass(frozen=True)
class Stored:
    """A tensor that `read` gives."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "Stored":
        """A tensor that is in memory."""
        return cls(tensor.shape, tensor.dtype, lambda: tensor)

    @property
    def like(self) -> Tensor:
        """A tensor of the same shape and dtype without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class StoredWeights(Mapping[str, Tensor]):
    """A mapping of names to tensors, each read anew whenever it is asked for."""

    def __init__(self, entries: Mapping[str, Stored]):
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def like(self) -> dict[str, Tensor]:
        """Tensors without values."""
        return {name: entry.like for name, entry in self.entries.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry.shape) for name, entry in self.entries.items()}

    @property
    def nbytes(self) -> int:
        return sum(entry.like.nbytes for entry in self.entries.values())

    def select(self, names: Iterable[str]) -> "StoredWeights":
        return StoredWeights({name: self.entries[name] for name in names})

    def renamed(self, rename: Callable[[str], str]) -> "StoredWeights":
        return StoredWeights({rename(name): entry for name, entry in self.entries.items()})

    def cast(self, dtype: torch.dtype | None) -> "StoredWeights":
        """The same weights, those that are floating point in `dtype`; None: as they are.

        Reading raises a UserError where `dtype` cannot hold a value.
        """
        if dtype is None:
            return self
        return StoredWeights(
            {
                name: Stored(entry.shape, dtype, partial(_read_as, dtype, name, entry))
                if entry.dtype.is_floating_point
                else entry
                for name, entry in self.entries.items()
            }
        )


def _read_as(dtype: torch.dtype, name: str, entry: Stored) -> Tensor:
    tensor = entry.read()
    cast = tensor.to(dtype)
    if tensor.isfinite().all() and not cast.isfinite().all():
        raise UserError(f"{name} is out of the range of {str(dtype).removeprefix('torch.')}: choose another dtype")
    return cast


class Window:
    """Counts what is read through the maps of some files, and after `WINDOW_BYTES` lets all of them be renewed."""

    def __init__(self) -> None:
        self.files: WeakSet[MappedFile] = WeakSet()  # they hold the window, and are to be unmapped when they go
        self.bytes_read = 0

    def make_room(self) -> None:
        if self.bytes_read >= WINDOW_BYTES:
            for file in self.files:
                file.release()
            self.bytes_read = 0


class MappedFile:
    """Tensors of a file by name, mapped.

    Args:
        open_tensors: maps the file anew and returns its tensors.
        window: that of all files that are read together.
    """

    def __init__(self, open_tensors: Callable[[], Mapping[str, Tensor]], window: Window):
        self._open = open_tensors
        self._tensors: Mapping[str, Tensor] | None = open_tensors()
        self._window = window
        window.files.add(self)

    def stored(self) -> dict[str, Stored]:
        return {
            name: Stored(tensor.shape, tensor.dtype, partial(self.read, name)) for name, tensor in self.tensors.items()
        }

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        if self._tensors is None:
            self._tensors = self._open()
        return self._tensors

    def release(self) -> None:
        """Unmap the file; what was read of it stays mapped for as long as someone holds it."""
        self._tensors = None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or its entries from `start` to `stop`; use it before the next one is read, and let go of it."""
        self._window.make_room()
        tensor = self.tensors[name].detach()  # DeepSpeed saves frozen weights as parameters
        if stop is not None:
            tensor = tensor[start:stop]
        self._window.bytes_read += tensor.nbytes
        return tensor


def open_weights(path: Path) -> StoredWeights:
    """The weights in a file, or in all files of a safetensors index; see `sgm.weights.read_state_dict`.

    Raises:
        UserError: it cannot be read, or holds no weights.
    """
    files = shard_files(path)
    entries: dict[str, Stored] = {}
    window = Window()
    for file in files:
        entries |= MappedFile(partial(_weights_in, file), window).stored()
    if len(files) > 1:
        read_state_dict(path)  # checks that the index and its files agree
    return StoredWeights(entries)


def _weights_in(file: Path) -> Mapping[str, Tensor]:
    return module_weights(read_state_dict(file), what=str(file))


def shard_files(path: Path) -> list[Path]:
    """The files of a safetensors index; of any other file itself.

    Raises:
        UserError: the index is none, or names a file that is not beside it.
    """
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    return [path.parent / name for name in sorted(set(read_weight_map(path).values()))]
