"""Tensors stored until a later layer needs them, on their device or in host memory."""

import torch
from torch import Tensor

from sgm.modules.autoencoding import meta_device


class WaitingRoom:
    """A store for pieces of a clip between two layers.

    Args:
        room: bytes of GPU memory that stored tensors may take together; further tensors go to host memory.

    Attributes:
        host_bytes, host_peak: bytes in host memory now, and the largest number so far.
    """

    def __init__(self, room: int = 0):
        self.room = room
        self.host_bytes = self.host_peak = 0

    def keep(self, x: Tensor) -> "Waiting":
        """Store a tensor.

        The caller should hold no other reference to the tensor, since that would keep its memory in use.
        """
        if meta_device.type_of(x) == "cpu" or x.nbytes <= self.room:
            if meta_device.type_of(x) != "cpu":
                self.room -= x.nbytes
            return Waiting(self, x, x.device)
        self.host_bytes += x.nbytes
        self.host_peak = max(self.host_peak, self.host_bytes)
        return Waiting(self, in_host_memory(x), x.device)


class Waiting:
    """A stored tensor."""

    def __init__(self, place: WaitingRoom, x: Tensor, device: torch.device):
        self._place, self._tensor, self._device = place, x, device

    def copy(self) -> Tensor:
        """Return a copy of the tensor on its device; the tensor stays stored."""
        return self._tensor.to(self._device, non_blocking=True, copy=True)

    def take(self) -> Tensor:
        """Return the tensor on its device, and remove it from the store."""
        x = self._tensor
        del self._tensor
        if x.device != self._device:
            self._place.host_bytes -= x.nbytes
            return x.to(self._device, non_blocking=True)
        if meta_device.type_of(x) != "cpu":
            self._place.room += x.nbytes
        return x


def in_host_memory(x: Tensor) -> Tensor:
    """Return a copy of `x` in host memory, in the same layout.

    On a GPU the copy is filled in the order of the operations on the device, and only such operations may read it.
    """
    if x.device.type == "meta":  # memory is only estimated
        return torch.empty_like(x, device="meta" if meta_device.type_of(x) == "cpu" else "cpu")
    copy = torch.empty_like(x, device="cpu", pin_memory=x.device.type == "cuda" and torch.cuda.is_available())
    return copy.copy_(x, non_blocking=True)
