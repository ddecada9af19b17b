"""How a network runs its layers: through a stack of functions, each of which may do something around every layer."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from cogvideox_sat.latent_geometry import Grid

RunLayer = Callable[[Tensor], Tensor]
"""Takes tokens (b, n, d) through a layer."""


@dataclass(eq=False)
class SamplingProgress:
    """How far a sampler is with its videos; those of another run of the sampler have another object.

    Attributes:
        steps: how many it takes.
        step: the one that it is at, from 0.
            Both are None where nobody tells, as in training and with a sampler of one's own that has no `callback`.
    """

    steps: int | None = None
    step: int | None = None


@dataclass(frozen=True)
class LayerContext:
    """What is known where a layer runs.

    Attributes:
        layer, layers: its index, and how many layers the network has.
        timesteps: (b,), of the noise levels.
        grid: patches of the video along (t, h, w).
        text_length: tokens in front of those of the video.
        training: the network is in training mode.
        sampling: the step and the video that a sampler is at.
        keeps_attention: the layer itself keeps no more than the result of its attention, where that is what it is to do
            in training; else the function around it has to see to that.
    """

    layer: int
    layers: int
    timesteps: Tensor
    grid: Grid
    text_length: int
    training: bool
    sampling: SamplingProgress
    keeps_attention: bool = False


AroundLayer = Callable[[RunLayer, Tensor, LayerContext], Tensor]
"""Called as `around(run, hidden, context)`; returns `run(hidden)`, or what is to stand for it. `run` is the layer with
the functions between it and this one."""


class LayerRunner:
    """Runs layers through a stack of functions.

    Args:
        around: the functions, the outermost first.
    """

    def __init__(self, around: Iterable[AroundLayer] = ()):
        self.around = tuple(around)
        self.sampling = SamplingProgress()

    def add(self, around: AroundLayer, outermost: bool = False) -> None:
        """Put another function into the stack, next to the layer or around all others."""
        self.around = (around, *self.around) if outermost else (*self.around, around)

    def __call__(self, run: RunLayer, hidden: Tensor, context: LayerContext) -> Tensor:
        """Return the tokens `hidden` (b, n, d) as they are after a layer."""
        for around in reversed(self.around):
            run = partial(_run_inside, around, run, context)
        return run(hidden)

    @contextmanager
    def during(self, sampling: SamplingProgress) -> Iterator[None]:
        """Have contexts say, within the block, that layers run for `sampling`."""
        before, self.sampling = self.sampling, sampling
        try:
            yield
        finally:
            self.sampling = before


def _run_inside(around: AroundLayer, run: RunLayer, context: LayerContext, hidden: Tensor) -> Tensor:
    return around(run, hidden, context)
