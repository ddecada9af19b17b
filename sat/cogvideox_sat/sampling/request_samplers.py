"""Change the configured sampler for single requests."""

from typing import Any

import torch

from cogvideox_sat.configuration.model_checks import check_sampler_steps, try_sampler
from cogvideox_sat.configuration.sampler_knobs import NO_KNOBS, SamplerKnobs, changed_sampler
from diffusion_video import SATVideoDiffusionEngine
from sgm.config_places import section
from sgm.errors import UserError
from sgm.modules.diffusionmodules.sampling_bar import hide_bar
from sgm.util import instantiate_from_config


class RequestSamplers:
    """The engine's sampler, and changed ones; each change is built once."""

    def __init__(self, engine: SATVideoDiffusionEngine):
        self.engine = engine
        self._changed: dict[SamplerKnobs, Any] = {}

    def of(self, knobs: SamplerKnobs) -> Any:
        """Return the configured sampler with the given changes; no weights are read for it.

        Raises:
            UserError: the sampler does not have one of these settings, or a value does not fit the model.
        """
        if not knobs.given():
            return self.engine.sampler
        if knobs not in self._changed:
            config = dict(self.engine.config)
            config["sampler_config"] = changed_sampler(config["sampler_config"], knobs)
            with torch.random.fork_rng(devices=[]), section("model", config, None):
                sampler = instantiate_from_config(config["sampler_config"])
                if config["sampler_config"]["target"].startswith("sgm."):
                    try_sampler(sampler, self.engine.denoiser)
            hide_bar(sampler)
            self._changed[knobs] = self.engine.shared_sampler(sampler)
        return self._changed[knobs]

    def steps_of(self, steps: int | None, knobs: SamplerKnobs = NO_KNOBS, name: str = "sampling_num_steps") -> int:
        """Return the number of steps of a request that asks for `steps`.

        Args:
            steps: None for the sampler's own number.
            name: the caller's name for the number, for messages.

        Raises:
            UserError: the sampler has no number of its own, or cannot take that many steps; or see `of`.
        """
        sampler = self.of(knobs)
        if steps is None:
            steps = getattr(sampler, "num_steps", None)
            if steps is None:
                raise UserError(f"sampler_config: num_steps: missing; give {name}")
        check_sampler_steps(sampler, steps, name)
        return steps
