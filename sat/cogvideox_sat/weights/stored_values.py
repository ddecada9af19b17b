"""Tensors that stay in their files until it is known which part of them is needed.

A parameter can wait for its values: it has the shape, dtype and device of the real parameter, but takes no memory. This
is for ZeRO-3, where each process needs a part of every parameter.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ATTRIBUTE = "stored_value"


class StoredValue:
    """A tensor made of other tensors, concatenated along the first dimension.

    These tensors may be mapped files.
    """

    def __init__(self, rows: Sequence[Tensor]):
        self.rows = [part.detach() for part in rows]
        first = self.rows[0]
        count = sum(part.shape[0] for part in self.rows) if len(self.rows) > 1 else None
        self.shape = first.shape if count is None else torch.Size((count, *first.shape[1:]))
        self.dtype, self.ndim = first.dtype, first.ndim

    def tensor(self) -> Tensor:
        """Return the whole tensor; a view if it consists of one tensor."""
        return self.rows[0] if len(self.rows) == 1 else torch.cat(self.rows)

    def fill(self, target: Tensor, start: int, stop: int) -> None:
        """Set the entries `start` to `stop` of a contiguous tensor of the same shape.

        The indices count the entries of the flattened tensor. Other entries are neither read nor written.
        """
        flat, first = target.view(-1), 0
        for part in self.rows:
            begin, end = max(start, first), min(stop, first + part.numel())
            if begin < end:
                flat[begin:end].copy_(part.reshape(-1)[begin - first : end - first])
            first += part.numel()


def waiting(old: Tensor, value: StoredValue, device: torch.device | str | None) -> nn.Parameter:
    """Return a parameter that replaces `old` and waits for its value.

    It has the dtype and attributes of `old`.

    Args:
        device: device of the parameter; None: the device of `old`, or the CPU if `old` is on meta.
    """
    if device is None:
        device = "cpu" if old.is_meta else old.device
    stand_in = torch.zeros((), dtype=old.dtype, device=device).expand(value.shape)
    parameter = nn.Parameter(stand_in, requires_grad=old.requires_grad)
    parameter.__dict__.update(vars(old))
    setattr(parameter, _ATTRIBUTE, value)
    return parameter


def value_of(parameter: Tensor) -> StoredValue | None:
    """Return the value for which a parameter waits, or None if it has its value."""
    return getattr(parameter, _ATTRIBUTE, None)


def forget_value(parameter: Tensor) -> None:
    """Mark a parameter as having its values."""
    delattr(parameter, _ATTRIBUTE)


def waiting_bytes(module: nn.Module) -> int:
    """Return the total size in bytes of the module's parameters that wait for their values."""
    return sum(each.numel() * each.element_size() for each in module.parameters() if value_of(each) is not None)
