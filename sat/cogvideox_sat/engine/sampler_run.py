"""Run a sampler on the engine's network: its start, and what each step calls."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cogvideox_sat.network.batch_parts import in_parts
from cogvideox_sat.network.layer_runner import SamplingProgress
from cogvideox_sat.network.modulation_table import AskedLevel, LevelNotes
from cogvideox_sat.parallel.video_groups import VideoGroups
from sgm.errors import UserError
from sgm.modules.diffusionmodules.sampling_bar import hide_bar
from sgm.modules.diffusionmodules.sampling_start import Start
from sgm.signatures import accepts

Network = Callable[..., Tensor]


def agreed_start(start: Start, shape: tuple[int, ...], device: torch.device, groups: VideoGroups) -> Start:
    """Return the start of sampling, equal in all processes that share a video.

    Its latents are in float32 on `device`.

    Args:
        shape: shape (b, t, c, h, w) of the latents to sample.

    Raises:
        UserError: the clip or the prefix does not fit into latents of this shape.
    """
    clip, prefix = start.clip, start.prefix
    if clip is not None and clip.shape != shape:
        raise UserError(f"video: latents of shape {tuple(clip.shape)} do not fit into {shape}")
    if prefix is not None and not (
        prefix.shape[1] < shape[1] and prefix.shape == (shape[0], prefix.shape[1], *shape[2:])
    ):
        raise UserError(f"prefix: latents of shape {tuple(prefix.shape)} cannot be the first frames of {shape}")
    on_device = [None if x is None else groups.agreed(x.float().to(device)) for x in (clip, prefix)]
    return replace(start, clip=on_device[0], prefix=on_device[1])


class SamplerRun:
    """One run of a sampler, which may be a user's own.

    The sampler gets those of `ofs`, `callback` and `start` that its `__call__` takes. If it takes no `ofs`, the network
    gets `ofs` in each step all the same.

    Attributes:
        progress: the current step, which the layers of the network can read.

    Args:
        sampler: called as `sampler(denoise, noise, cond, uc=uc, num_steps=num_steps, ...)`.
        denoiser: called as `denoiser(network, x, noise level, cond, **inputs)`.
        groups: the processes that make the video together.
        cond, uc: conditional and unconditional embeddings.
        start: what sampling starts from; see `agreed_start`.
        num_steps: number of steps; None: the sampler's own number.
        ofs: (b,), for 1.5 image-to-video.
        callback: called as `callback(steps done, steps)`, with `denoised=` if it takes that and the sampler reports it.
        batch: None: the network computes both halves of guidance together; else it computes so many samples at a time.
        check: called with each denoised batch; raises UserError to end the run.

    Raises:
        UserError: the sampler cannot start from a clip.
    """

    def __init__(
        self,
        sampler: Any,
        denoiser: Callable[..., Tensor],
        groups: VideoGroups,
        *,
        cond: dict[str, Tensor],
        uc: dict[str, Tensor] | None,
        start: Start,
        num_steps: int | None,
        ofs: Tensor | None,
        callback: Callable[..., None] | None,
        batch: int | None,
        check: Callable[[Tensor], None] | None,
    ):
        self.sampler, self.denoiser, self.groups = sampler, denoiser, groups
        self.cond, self.uc, self.start, self.num_steps = cond, uc, start, num_steps
        self.callback, self.batch, self.check = callback, batch, check
        self.shows_estimate = callback is not None and accepts(callback, "denoised")
        self.progress = SamplingProgress()
        if start.clip is not None and not accepts(sampler, "start"):
            raise UserError(f"video: {type(sampler).__name__} takes no `start`; use one of this package's samplers")
        keywords = {"ofs": ofs, "callback": self._report, "start": start}
        self.keywords: dict[str, Any] = {name: value for name, value in keywords.items() if accepts(sampler, name)}
        self.inputs = {} if ofs is None or "ofs" in self.keywords else {"ofs": ofs}
        if "callback" in self.keywords:
            steps = num_steps or getattr(sampler, "num_steps", None)
            self.progress.step, self.progress.steps = 0, steps and start.steps(steps)

    def __call__(self, network: Network, noise: Tensor) -> Tensor:
        """Return the sampled latents (b, t, c, h, w), equal in all processes that share the video.

        Args:
            network: called as `network(x, t, cond, **inputs)`.
            noise: (b, t, c, h, w).
        """
        latents = self.groups.agreed(self._run(self.sampler, network, noise, self.keywords))
        if self.check is not None and self.groups.splits_work:
            self.check(latents)
        return latents

    def asked_levels(self, noise: Tensor) -> list[AskedLevel]:
        """Return the noise levels that the sampler asks the network for, in their order.

        The network does not run. The random state is restored afterwards.

        Args:
            noise: as in `__call__`; only its batch size and device matter.
        """
        smallest = noise.new_zeros(len(noise), *[1] * (noise.ndim - 1))
        start = replace(self.start, clip=None if self.start.clip is None else smallest, prefix=None)
        keywords = {name: value for name, value in self.keywords.items() if name != "callback"} | {"start": start}
        notes, sampler = LevelNotes(), copy.copy(self.sampler)
        hide_bar(sampler)
        with torch.random.fork_rng(devices=[noise.device] if noise.is_cuda else []):
            self._run(sampler, notes, smallest, keywords)
        return notes.levels

    def _run(self, sampler: Any, network: Network, noise: Tensor, keywords: dict[str, Any]) -> Tensor:
        if self.batch is not None:
            network = in_parts(network, self.batch)

        def denoise(x: Tensor, level: Tensor, c: dict[str, Tensor], **inputs: Any) -> Tensor:
            x = self.groups.agreed(x)
            denoised = self.denoiser(network, x, level, c, **{**self.inputs, **inputs})
            if self.check is not None:
                # Processes that share the work must all stop at the same place, where all of them have the same values.
                self.check(x if self.groups.splits_work else denoised)
            return denoised

        return sampler(denoise, noise, self.cond, uc=self.uc, num_steps=self.num_steps, **keywords)

    def _report(self, done: int, steps: int, denoised: Tensor | None = None) -> None:
        self.progress.step, self.progress.steps = done, steps
        if self.callback is not None:
            estimate = {"denoised": denoised} if denoised is not None and self.shows_estimate else {}
            self.callback(done, steps, **estimate)
