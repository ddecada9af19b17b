"""Copy tensors to host memory, to write them to files while the tensors change."""

import copy
import logging
import mmap
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from cogvideox_sat.files.sizes import in_words
from cogvideox_sat.runs.host_memory import free_host_memory

logger = logging.getLogger(__name__)

SLAB_BYTES = 2**30
ALIGNMENT = 64
SHARE = 0.9  # largest share of the free host memory to use


class StagingMemory:
    """Host memory that is filled with copies of tensors repeatedly.

    It is allocated in slabs and kept, because allocating memory from the operating system, and page-locking it for a
    GPU, takes longer than filling it. PyTorch would round the size of each page-locked tensor up to a power of two.

    Args:
        pinned: page-lock the memory, so that a GPU copies into it at the full speed of the bus.
    """

    def __init__(self, pinned: bool):
        self.pinned = pinned
        self.slabs: list[memoryview] = []
        self.start_over()

    def allows(self, needed: int) -> bool:
        """Return whether the machine has room for `needed` bytes; log it if not."""
        free = free_host_memory()
        held = sum(slab.nbytes for slab in self.slabs)
        if free is None or needed <= held or needed <= held + SHARE * free:
            return True
        logger.warning(
            "background_checkpoints: a copy of a checkpoint takes %s of host memory, of which %s are free; "
            "checkpoints are written between steps",
            in_words(needed),
            in_words(free),
        )
        return False

    def start_over(self, needed: int = SLAB_BYTES) -> None:
        """Discard all copies, and reuse their memory.

        Args:
            needed: approximate size of the next copies in bytes.
        """
        self._slab = self._used = 0
        self._step = min(SLAB_BYTES, max(needed, ALIGNMENT))

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor with its own storage and the same memory layout.

        The copy is complete after `wait`.
        """
        tensor = tensor.detach()
        if not tensor.numel():
            return tensor.to("cpu", copy=True)
        target = self._room(tensor.nbytes, tensor.dtype)
        if not tensor.is_contiguous() and _is_dense(tensor):
            target = target.as_strided(tensor.shape, tensor.stride())
        else:
            target = target.view(tensor.shape)
        return target.copy_(tensor, non_blocking=self.pinned)

    def _room(self, size: int, dtype: torch.dtype) -> Tensor:
        while self._slab < len(self.slabs) and self._used + size > self.slabs[self._slab].nbytes:
            self._slab, self._used = self._slab + 1, 0
        if self._slab == len(self.slabs):
            self.slabs.append(self._new_slab(max(size, self._step)))
        begin, self._used = self._used, -(-(self._used + size) // ALIGNMENT) * ALIGNMENT
        # A tensor over this part of the slab only, so that a file contains nothing but this tensor.
        return torch.frombuffer(self.slabs[self._slab][begin : begin + size], dtype=dtype)

    def _new_slab(self, size: int) -> memoryview:
        if self.pinned:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().data
            except RuntimeError as error:  # the system limits page-locked memory
                logger.debug("no page-locked memory: %s", error)
                self.pinned = False
        slab = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Large pages are allocated faster. Without DONTFORK, processes forked to read clips would keep this memory.
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            with suppress(AttributeError, OSError):  # not supported by this system
                slab.madvise(getattr(mmap, advice))
        return memoryview(slab)

    def wait(self) -> None:
        """Wait until all copies are complete."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor fills its memory, in any order of its axes."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda axis: axis[1]):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def staged(content: Any, memory: StagingMemory) -> Any:
    """Return a copy of nested mappings, lists and tuples, with tensors copied to `memory`.

    Tensors that share memory in `content`, and objects that occur twice, do so in the copy, too: `torch.save` writes
    the same file, except for the names of devices.
    """
    return _Stager(memory).copy(content)


class _Stager:
    def __init__(self, memory: StagingMemory):
        self.memory = memory
        self.done: dict[int, Any] = {}  # by the id of the original
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.kept: list[Any] = []  # originals, kept alive so that ids stay unique

    def copy(self, value: Any) -> Any:
        if id(value) in self.done:
            return self.done[id(value)]
        if isinstance(value, Tensor):
            made: Any = self.tensor(value)
        elif isinstance(value, Mapping):
            made = copy.copy(value)  # keeps the attributes of state dicts
            for key, item in value.items():
                made[key] = self.copy(item)
        elif isinstance(value, list):
            made = copy.copy(value)
            made[:] = [self.copy(item) for item in value]
        elif type(value) is tuple:
            made = tuple(self.copy(item) for item in value)
        else:
            return value
        self.done[id(value)] = made
        self.kept.append(value)
        return made

    def tensor(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.storages or not storage.nbytes():
            whole = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
            self.storages[storage.data_ptr()] = self.memory.copy(whole).untyped_storage()
        made = torch.empty(0, dtype=value.dtype)
        made.set_(self.storages[storage.data_ptr()], value.storage_offset(), value.size(), value.stride())
        if isinstance(value, torch.nn.Parameter):
            return torch.nn.Parameter(made, value.requires_grad)
        return made.requires_grad_(value.requires_grad)
