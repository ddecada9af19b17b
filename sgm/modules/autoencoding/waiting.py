"""Tensors that wait: on their device as long as there is room for them, then in host memory."""

import torch
from torch import Tensor


class WaitingRoom:
    """Where pieces of a clip wait between two layers.

    Args:
        room: bytes of a GPU's memory that those which wait may take together; the others wait in host memory.

    Attributes:
        host_bytes, host_peak: how much waits in host memory, and the most that has.
    """

    def __init__(self, room: int = 0):
        self.room = room
        self.host_bytes = self.host_peak = 0

    def keep(self, x: Tensor) -> "Waiting":
        """Let a tensor wait. The caller should hold no other reference to it, or its memory is not freed."""
        if x.device.type == "cpu" or x.nbytes <= self.room:
            if x.device.type != "cpu":
                self.room -= x.nbytes
            return Waiting(self, x, x.device)
        self.host_bytes += x.nbytes
        self.host_peak = max(self.host_peak, self.host_bytes)
        return Waiting(self, in_host_memory(x), x.device)


class Waiting:
    """A tensor that waits."""

    def __init__(self, place: WaitingRoom, x: Tensor, device: torch.device):
        self._place, self._tensor, self._device = place, x, device

    def copy(self) -> Tensor:
        """Return a copy of the tensor, on its device; it goes on waiting."""
        return self._tensor.to(self._device, non_blocking=True, copy=True)

    def take(self) -> Tensor:
        """Return the tensor, on its device; it waits no longer."""
        x = self._tensor
        del self._tensor
        if x.device != self._device:
            self._place.host_bytes -= x.nbytes
            return x.to(self._device, non_blocking=True)
        if x.device.type != "cpu":
            self._place.room += x.nbytes
        return x


def in_host_memory(x: Tensor) -> Tensor:
    """Return a copy of `x` in host memory, in the same layout; on the CPU itself a copy like any other.

    It is filled in the order of the operations on the device of `x`, and only such may read it.
    """
    copy = torch.empty_like(x, device="cpu", pin_memory=x.device.type == "cuda" and torch.cuda.is_available())
    return copy if x.device.type == "meta" else copy.copy_(x, non_blocking=True)  # meta: an estimate of memory
