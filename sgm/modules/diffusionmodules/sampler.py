"""Base class of the samplers: everything around the loop over steps.

Guidance, noise, the network's inputs, callbacks and a start from a clip are here; the loops are in `sampling`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgm.errors import UserError, shown
from sgm.modules.diffusionmodules.guiders import IdentityGuider, guided_estimate
from sgm.modules.diffusionmodules.sampling_bar import SamplingBar
from sgm.modules.diffusionmodules.sampling_start import NOISE, Start
from sgm.modules.diffusionmodules.sampling_utils import Generators, noise_like, steps_of_call
from sgm.signatures import accepts
from sgm.util import instantiate_from_config


@dataclass
class Run:
    """The inputs of a sampler's loop in one call.

    Attributes:
        a, s: from noisy to clean, with one number more than there are steps: the clean sample, where s is 0.
        num_steps: number of steps of the whole schedule; a start from a clip skips the first of them.
        steps: the indices of the steps, from 0, with the progress bar.
        denoise: `denoise(x, step, level)` returns the guided estimate of the clean sample, by default at the level of
            the step.
        noise: `noise(x)` returns fresh noise shaped like `x`.
    """

    a: list[float]
    s: list[float]
    num_steps: int
    steps: Iterable[int]
    denoise: Callable[..., Tensor]
    noise: Callable[[Tensor], Tensor]


class Sampler(SamplingBar, ABC):
    """Base class of the samplers: everything around the loop.

    A sampler defines `schedule`, its levels, and `sample`, its loop. `VideoSampler` and `SigmaSampler` have a schedule.

    Args:
        discretization_config: the noise schedule.
        num_steps: number of steps, unless a call gives it.
        guider_config: guidance; none by default.
        verbose: show a progress bar (on the first process only).
        device: accepted from configurations; sampling runs on the device of `x`.
        guidance_interval: the part of the steps with guidance, such as [0.2, 0.8]; in other steps the network runs on
            the conditional batch alone (arXiv:2404.07724, in steps rather than levels). None: all steps.

    Raises:
        UserError: `guidance_interval` is not such an interval.
    """

    variance_preserving: bool  # the denoiser takes the level a and the timestep `idx`; otherwise it takes s
    fixed_frames = 0  # number of clean frames at the start of `x` that are kept, unless a call gives a `start`
    sdedit = False  # keep such frames at the noise level of each step rather than clean

    def __init__(
        self,
        discretization_config: Mapping[str, Any],
        num_steps: int | None = None,
        guider_config: Mapping[str, Any] | None = None,
        verbose: bool = False,
        device: str | None = None,
        guidance_interval: Sequence[float] | None = None,
    ):
        self.discretization = instantiate_from_config(discretization_config)
        self.num_steps = num_steps
        self.guider = instantiate_from_config(guider_config) if guider_config else IdentityGuider()
        self.guidance_interval = None if guidance_interval is None else checked_interval(guidance_interval)
        self.show_bar(verbose)

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Callable[..., Tensor],
        x: Tensor,
        cond: dict[str, Tensor],
        uc: dict[str, Tensor] | None = None,
        num_steps: int | None = None,
        scale: float | Tensor | None = None,
        scale_emb: Tensor | None = None,
        ofs: float | Tensor | None = None,
        generator: Generators = None,
        callback: Callable[..., None] | None = None,
        start: Start | None = None,
    ) -> Tensor:
        """Return clean samples shaped like `x`, float32.

        Args:
            denoiser: called as `denoiser(x, level, cond, **model_inputs)`, see `Denoiser.forward`.
            x: (batch, ...) standard normal noise.
            cond: conditioning by kind, (batch, ...) each.
            uc: the unconditional conditioning, with the same kinds; None: no guidance.
            num_steps: replaces the configured number of steps.
            scale: replaces the guider's scale; a number or (batch,); the number 1 turns guidance off.
            scale_emb: embedding of the guidance scale, (batch, features), for networks distilled to take one.
            ofs: the network's second noise input (CogVideoX 1.5 image-to-video), a number or (batch,).
            generator: source of the noise that is added during sampling, see `draw_noise`.
            callback: called as `callback(steps done, steps in all)` after each step; if it takes the keyword
                `denoised`, it gets the last guided estimate of the clean samples.
            start: the start of sampling, and the frames to continue. None: noise alone, whose first `fixed_frames`
                frames are clean frames to continue, as in the original.

        Raises:
            UserError: the number of steps is not given, or the noise schedule has fewer.
        """
        num_steps = steps_of_call(num_steps, self.num_steps)
        configured_steps = num_steps if self.num_steps is None else self.num_steps
        x = x.float()
        if start is None:
            start = Start(prefix=x[:, : self.fixed_frames]) if self.fixed_frames else NOISE
        first = num_steps - start.steps(num_steps)
        a, s, timesteps = self.schedule(num_steps)
        a, s, timesteps = a[first:], s[first:], timesteps[first:]
        levels = a if self.variance_preserving else s

        guides = uc is not None and (isinstance(scale, Tensor) or scale != 1)
        scale = scale.to(x.device) if isinstance(scale, Tensor) else scale
        given = {"scale_emb": scale_emb, "ofs": ofs}
        given = {name: _per_sample(value, x) for name, value in given.items() if value is not None}

        def noise(x: Tensor) -> Tensor:
            return noise_like(x, generator)

        def denoise(x: Tensor, step: int, level: float | None = None) -> Tensor:
            x = start.with_prefix(x, *((a[step], s[step], noise) if self.sdedit else ()))
            timestep, done = timesteps[step], (first + step) / num_steps
            model_inputs = dict(given)
            if self.variance_preserving:
                model_inputs["idx"] = x.new_full((len(x),), timestep, dtype=torch.long)
            told: dict[str, Any] = {
                "scale": scale,
                "step_index": configured_steps - timestep,
                "progress": done,
                "shortfall": (num_steps - timestep) / num_steps,
            }
            guider = self.guider if guides and self._is_guided(done) else IdentityGuider()
            level_of_each = x.new_full((len(x),), levels[step] if level is None else level)
            estimate[:] = [guided_estimate(guider, denoiser, x, level_of_each, cond, uc, model_inputs, told)]
            return estimate[0]

        estimate: list[Tensor] = []  # the last one
        x = self.noised(x, None if start.clip is None else start.clip.to(x), a[0], s[0])
        steps = self._count_steps(num_steps - first, callback, estimate)
        run = Run(a, s, num_steps, steps, denoise, noise)
        return start.with_prefix(self.sample(x, run))

    def noised(self, noise: Tensor, clip: Tensor | None, a: float, s: float) -> Tensor:
        """Return the start of the loop, a·clip + s·ε; without a clip, noise of the right variance.

        Args:
            noise, clip: ε and clean samples, (batch, ...) each.
            a, s: the first level.
        """
        return noise if clip is None else a * clip + s * noise

    def _is_guided(self, done: float) -> bool:
        """Return whether a step has guidance, from the share of the steps before it."""
        if self.guidance_interval is None:
            return True
        first, last = self.guidance_interval
        return first <= done and (done < last or last == 1)

    @abstractmethod
    def schedule(self, num_steps: int) -> tuple[list[float], list[float], list[int]]:
        """Return `a` and `s` of `Run`, and the timestep of each step."""

    @abstractmethod
    def sample(self, x: Tensor, run: Run) -> Tensor:
        """Return clean samples from `x`, the noise at the first level: the loop over steps."""

    def _count_steps(
        self, num_steps: int, callback: Callable[..., None] | None, estimate: Sequence[Tensor]
    ) -> Iterator[int]:
        """Yield the indices of the steps, with the progress bar; call back after each step."""
        shows = callback is not None and accepts(callback, "denoised")
        for step in self.counted(range(num_steps)):
            yield step
            if callback is not None:
                callback(step + 1, num_steps, **({"denoised": estimate[-1]} if shows else {}))


def checked_interval(interval: Any) -> tuple[float, float]:
    """Return an interval of steps as two shares of the steps.

    Raises:
        UserError: `interval` is not such an interval.
    """
    fits = isinstance(interval, list | tuple) and [type(end) in (int, float) for end in interval] == [True, True]
    if not fits or not 0 <= interval[0] < interval[1] <= 1:
        raise UserError(
            f"guidance_interval: got {shown(interval)}; expected two shares of the steps such as [0.2, 0.8], the "
            "smaller one first"
        )
    return interval[0], interval[1]


def _per_sample(value: float | Tensor, x: Tensor) -> Tensor:
    """Return `value` as a tensor (batch, ...) on the device of `x`.

    A number or a batch of one applies to all samples.
    """
    if not isinstance(value, Tensor):
        return x.new_full((len(x),), value)
    value = value.to(x.device)
    return value.expand(len(x), *value.shape[1:])
