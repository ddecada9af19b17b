"""Run the layers of a network through a stack of functions around every layer."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from cogvideox_sat.latent_geometry import Grid

RunLayer = Callable[[Tensor], Tensor]
"""Returns the tokens (b, n, d) after a layer."""


@dataclass(eq=False)
class SamplingProgress:
    """The progress of one run of a sampler; each run has its own object.

    Attributes:
        steps: number of steps.
        step: current step, from 0.
            Both are None if nothing reports them, as in training and with a user's own sampler that has no `callback`.
    """

    steps: int | None = None
    step: int | None = None


@dataclass(frozen=True)
class LayerContext:
    """The circumstances in which a layer runs.

    Attributes:
        layer, layers: index of the layer, and number of layers of the network.
        timesteps: (b,), of the noise levels.
        grid: patches of the video along (t, h, w).
        text_length: number of tokens before those of the video.
        training: the network is in training mode.
        sampling: progress of the sampler.
        keeps_attention: where training should keep only the result of a layer's attention, the layer itself takes care
            of that; otherwise the function around it has to.
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
"""Called as `around(run, hidden, context)`; returns `run(hidden)`, or a replacement for it. `run` is the layer with the
functions between the layer and this function."""


class LayerRunner:
    """Runs layers through a stack of functions.

    Args:
        around: the functions, the outermost first.
    """

    def __init__(self, around: Iterable[AroundLayer] = ()):
        self.around = tuple(around)
        self.sampling = SamplingProgress()

    def add(self, around: AroundLayer, outermost: bool = False) -> None:
        """Add a function to the stack, next to the layer or around all others."""
        self.around = (around, *self.around) if outermost else (*self.around, around)

    def __call__(self, run: RunLayer, hidden: Tensor, context: LayerContext) -> Tensor:
        """Return the tokens `hidden` (b, n, d) after a layer."""
        for around in reversed(self.around):
            run = partial(_run_inside, around, run, context)
        return run(hidden)

    @contextmanager
    def during(self, sampling: SamplingProgress) -> Iterator[None]:
        """Set the sampler's progress in the contexts of layers within the block."""
        before, self.sampling = self.sampling, sampling
        try:
            yield
        finally:
            self.sampling = before


def _run_inside(around: AroundLayer, run: RunLayer, context: LayerContext, hidden: Tensor) -> Tensor:
    return around(run, hidden, context)
