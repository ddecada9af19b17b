"""An exponential moving average of a module's weights, kept beside them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sgm.moving_averages import follow, kept_share


class LitEma(nn.Module):
    """Averages of the trainable parameters of `model`, in buffers, so that they are saved and moved with it.

    The n-th update, from 1, of a shadow s of a parameter p is s ← d·s + (1 − d)·p with d = `decay`, or while it is
    less (1 + n)/(10 + n), by which the average soon forgets the weights that it starts from. Shadows have the dtype
    of their parameters. Which parameters are averaged is settled here: those that require a gradient now.

    Args:
        decay: the share of the average that each update keeps, from 0 to 1.
        use_num_upates: raise the decay slowly, as above (the spelling of the configs in use).
        skip: prefixes of parameter names to leave out.

    Raises:
        ValueError: `decay` is out of range.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True, skip: Sequence[str] = ()):
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; it is from 0 to 1")
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
        """Begin the slow rise of the decay anew."""
        self.num_updates.zero_()

    def shadows(self) -> dict[str, Tensor]:
        """The averages, by the names of their parameters."""
        return {name: getattr(self, buffer) for name, buffer in self.shadow_names.items()}

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Update the averages with the weights that `model` has now."""
        self.num_updates += 1
        # The number is on the device, where the averages are: no update waits for it.
        follow(*self._pairs(model), kept_share(self.decay, self.num_updates, self.use_num_updates))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights of `model` by their averages."""
        shadows, parameters = self._pairs(model)
        torch._foreach_copy_(parameters, shadows)

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep a copy of `parameters` for `restore`."""
        self.stored = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give the same `parameters` back the values that `store` kept."""
        torch._foreach_copy_(list(parameters), self.stored)
        self.stored = []

    def averaged_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Those of `model` that `copy_to` overwrites."""
        return self._pairs(model)[1]

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[nn.Parameter]]:
        parameters = dict(model.named_parameters())
        return list(self.shadows().values()), [parameters[name] for name in self.shadow_names]


def _buffer_names(names: Iterable[str]) -> dict[str, str]:
    """A name without dots, which buffers may not have, for each parameter name."""
    taken = {"num_updates"}
    buffers = {}
    for name in names:
        buffer = name.replace(".", "")
        while buffer in taken:  # such as 1.11 and 11.1
            buffer += "_"
        taken.add(buffer)
        buffers[name] = buffer
    return buffers
