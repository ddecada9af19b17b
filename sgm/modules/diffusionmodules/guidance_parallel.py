"""Guidance with the conditional and the unconditional half on two processes."""

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sgm.errors import UserError
from sgm.modules.diffusionmodules.guiders import Cond


class GuidanceParallel:
    """A guider that runs one half on this process; both processes hold the combined result.

    Args:
        guider: lays out a batch of two halves, the unconditional one first, and combines what comes back.
        group: two processes, the one of the unconditional half first.
    """

    def __init__(self, guider: Any, group: dist.ProcessGroup):
        self.guider, self.group = guider, group
        self.half = dist.get_rank(group)
        self.__signature__ = inspect.signature(guider)  # a sampler reads the guider's keywords from it

    def __getattr__(self, name: str) -> Any:
        if name == "guider" or name.startswith("__"):  # copying asks for these before `__init__`
            raise AttributeError(name)
        return getattr(self.guider, name)

    def prepare_inputs(
        self, x: Tensor, s: Tensor, c: Cond, uc: Cond | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the network's inputs for this process's half: samples, levels, conditioning.

        Args:
            x: (batch, ...).
            s: (batch,) noise levels.

        Raises:
            UserError: the guider does not run the network on two halves.
        """
        samples, levels, cond = self.guider.prepare_inputs(x, s, c, uc)
        if len(samples) != 2 * len(x):
            raise UserError(
                f"guidance_parallel: {type(self.guider).__name__} runs the network on {len(samples)} samples for "
                f"{len(x)}, not on two halves; leave it out"
            )
        return (
            samples.chunk(2)[self.half],
            levels.chunk(2)[self.half],
            {kind: value.chunk(2)[self.half] for kind, value in cond.items()},
        )

    def __call__(self, x: Tensor, *args: Any, **told: Any) -> Tensor:
        """Combine this process's denoised half `x` (batch, ...) with the other process's half.

        See `VanillaCFG`.
        """
        halves = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2)]
        dist.all_gather(halves, x.contiguous(), group=self.group)
        return self.guider(torch.cat(halves), *args, **told)
