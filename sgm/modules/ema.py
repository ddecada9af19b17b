"""An exponential moving average of a module's weights, stored in its buffers."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sgm.moving_averages import follow, kept_share


class LitEma(nn.Module):
    """Exponential moving averages of the trainable parameters of `model`.

    Averages are buffers, so that they are saved and moved with the module. The n-th update, from 1, of an average s of
    a parameter p is s ← d·s + (1 − d)·p with d = min(`decay`, (1 + n)/(10 + n)): the average soon forgets the initial
    weights. Averages have the dtype of their parameters. The set of averaged parameters is fixed here: those that
    require a gradient now.

    Args:
        decay: the share of the average that each update keeps, from 0 to 1.
        use_num_upates: raise the decay slowly, as above (the spelling of released configurations).
        skip: prefixes of parameter names to leave out.

    Raises:
        ValueError: `decay` is out of range.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True, skip: Sequence[str] = ()):
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: got {decay}; it must be between 0 and 1")
        self.decay, self.use_num_updates = decay, use_num_upates
        averaged = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not name.startswith(tuple(skip))
        }
        self.shadow_names = _buffer_names(averaged)
        self.stored: list[Tensor] = []

        self.register_buffer("num_updates", torch.tensor(0))
        for name, parameter in averaged.items():
            self.register_buffer(self.shadow_names[name], parameter.detach().clone())

    def reset_num_updates(self) -> None:
        """Restart the slow rise of the decay."""
        self.num_updates.zero_()

    def shadows(self) -> dict[str, Tensor]:
        """Return the averages, by the names of their parameters."""
        return {name: getattr(self, buffer) for name, buffer in self.shadow_names.items()}

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Update the averages with the current weights of `model`."""
        self.num_updates += 1
        # `num_updates` is on the device of the averages, so that no update waits for it.
        follow(*self._pairs(model), kept_share(self.decay, self.num_updates, self.use_num_updates))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights of `model` with their averages."""
        shadows, parameters = self._pairs(model)
        torch._foreach_copy_(parameters, shadows)

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep a copy of `parameters` for `restore`."""
        self.stored = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Set the same `parameters` back to the values that `store` kept."""
        torch._foreach_copy_(list(parameters), self.stored)
        self.stored = []

    def averaged_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters of `model` that `copy_to` overwrites."""
        return self._pairs(model)[1]

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[nn.Parameter]]:
        parameters = dict(model.named_parameters())
        return list(self.shadows().values()), [parameters[name] for name in self.shadow_names]


def _buffer_names(names: Iterable[str]) -> dict[str, str]:
    """Return a buffer name for each parameter name; buffer names have no dots."""
    taken = {"num_updates"}
    buffers = {}
    for name in names:
        buffer = name.replace(".", "")
        while buffer in taken:  # such as 1.11 and 11.1
            buffer += "_"
        taken.add(buffer)
        buffers[name] = buffer
    return buffers
