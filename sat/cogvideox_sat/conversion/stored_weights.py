"""Read tensors from files: names, shapes and dtypes at once, values only when needed.

A file is mapped, and its data stays in memory as long as the map exists. Maps are therefore renewed from time to time,
so that a checkpoint of any size is converted in the memory of a few of its tensors.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor

from sgm.errors import UserError
from sgm.weights import INDEX_SUFFIX, module_weights, read_state_dict, read_weight_map

WINDOW_BYTES = 128 * 2**20  # bytes that may be read through one map


@dataclass(frozen=True)
class Stored:
    """Tensor that `read` returns."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "Stored":
        """Return a stored tensor whose value is already in memory."""
        return cls(tensor.shape, tensor.dtype, lambda: tensor)

    @property
    def like(self) -> Tensor:
        """Return a tensor of the same shape and dtype without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class StoredWeights(Mapping[str, Tensor]):
    """Mapping of names to tensors, each of which is read again whenever it is accessed."""

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
        """Return tensors on the meta device, by name, with the stored shapes and dtypes."""
        return {name: entry.like for name, entry in self.entries.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes by name."""
        return {name: tuple(entry.shape) for name, entry in self.entries.items()}

    @property
    def nbytes(self) -> int:
        """Return the size of all tensors in bytes."""
        return sum(entry.like.nbytes for entry in self.entries.values())

    def select(self, names: Iterable[str]) -> "StoredWeights":
        """Return the weights of these names."""
        return StoredWeights({name: self.entries[name] for name in names})

    def renamed(self, rename: Callable[[str], str]) -> "StoredWeights":
        """Return the same weights under other names."""
        return StoredWeights({rename(name): entry for name, entry in self.entries.items()})

    def cast(self, dtype: torch.dtype | None) -> "StoredWeights":
        """Return the weights with floating-point tensors in `dtype`; None: unchanged.

        Reading raises UserError if `dtype` cannot hold a value.
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
    if not all_finite(cast) and all_finite(tensor):
        raise UserError(f"{name} is out of the range of {str(dtype).removeprefix('torch.')}; choose another dtype")
    return cast


def widest_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype that holds the values of all floating-point dtypes.

    PyTorch promotes no 8-bit floats; their values are among those of float16 and of bfloat16.
    """
    found = set(dtypes)
    if len(found) == 1:
        return found.pop()
    return reduce(torch.promote_types, [dtype for dtype in found if dtype.itemsize > 1] or [torch.float16])


def all_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite, also of 8-bit floats, unlike `isfinite`."""
    wide = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    return bool(wide.isfinite().all())


class Window:
    """Counter of bytes read through maps of files; after `WINDOW_BYTES` maps are renewed."""

    def __init__(self) -> None:
        self.files: WeakSet[MappedFile] = WeakSet()  # weak, so that a file is unmapped when it is no longer used
        self.bytes_read = 0

    def make_room(self) -> None:
        """Unmap the files if `WINDOW_BYTES` were read since the last time."""
        if self.bytes_read >= WINDOW_BYTES:
            for file in self.files:
                file.release()
            self.bytes_read = 0


class MappedFile:
    """Tensors of a mapped file, by name.

    Args:
        open_tensors: a function that maps the file again and returns its tensors.
        window: the window of all files that are read together.
    """

    def __init__(self, open_tensors: Callable[[], Mapping[str, Tensor]], window: Window):
        self._open = open_tensors
        self._tensors: Mapping[str, Tensor] | None = open_tensors()
        self._window = window
        window.files.add(self)

    def stored(self) -> dict[str, Stored]:
        """Return the tensors of the file, to be read when they are needed."""
        return {
            name: Stored(tensor.shape, tensor.dtype, partial(self.read, name)) for name, tensor in self.tensors.items()
        }

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors of the mapped file, after mapping it again if necessary."""
        if self._tensors is None:
            self._tensors = self._open()
        return self._tensors

    def release(self) -> None:
        """Unmap the file; its tensors that are still in use stay mapped."""
        self._tensors = None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return a tensor, or its entries from `start` to `stop`.

        Use it before the next one is read, and do not keep it.
        """
        self._window.make_room()
        tensor = self.tensors[name].detach()  # DeepSpeed saves frozen weights as parameters
        if stop is not None:
            tensor = tensor[start:stop]
        self._window.bytes_read += tensor.nbytes
        return tensor


def open_weights(path: Path) -> StoredWeights:
    """Return the weights in a file, or in all files of a safetensors index.

    See `sgm.weights.read_state_dict`.

    Raises:
        UserError: the file cannot be read, or holds no weights.
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
    """Return the files of a safetensors index; for any other file, the file itself.

    Raises:
        UserError: the file is not an index, or names a file that does not exist.
    """
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    return [path.parent / name for name in sorted(set(read_weight_map(path).values()))]
