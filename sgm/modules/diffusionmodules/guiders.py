"""Guidance: combine the denoised samples of a conditional and an unconditional run.

A sampler calls `prepare_inputs` to lay out the batch for the network, and the guider itself with the network's results.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sgm.errors import UserError
from sgm.modules.diffusionmodules.thresholding import NoDynamicThresholding
from sgm.util import instantiate_from_config

Cond = Mapping[str, Tensor]
"""Conditioning by kind, (batch, ...) each."""


class IdentityGuider:
    """No guidance: the network runs on the conditional batch alone."""

    def prepare_inputs(
        self, x: Tensor, s: Tensor, c: Cond, uc: Cond | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the network's inputs: `x` (batch, ...), levels `s` (batch,) and conditioning."""
        return x, s, dict(c)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        scale: float | Tensor | None = None,
        step_index: int | None = None,
        progress: float | None = None,
    ) -> Tensor:
        """Return the denoised samples `x` (batch, ...) unchanged; see `VanillaCFG` for the others."""
        return x


class VanillaCFG:
    """Classifier-free guidance u + w·(c − u) with a constant weight w (Ho and Salimans 2022).

    Args:
        dyn_thresh_config: another way to combine the halves, see `thresholding`.

    Raises:
        UserError: this object cannot be called as the classes of `thresholding` are.
    """

    def __init__(self, scale: float, dyn_thresh_config: Mapping[str, Any] | None = None):
        self.scale = scale
        self.dyn_thresh = instantiate_from_config(dyn_thresh_config) if dyn_thresh_config else NoDynamicThresholding()
        call = self.dyn_thresh.forward if isinstance(self.dyn_thresh, nn.Module) else self.dyn_thresh
        try:
            inspect.signature(call).bind(None, None, scale)
        except TypeError as error:
            raise UserError(
                f"dyn_thresh_config: {type(self.dyn_thresh).__name__} cannot be called with (uncond, cond, scale): "
                f"{error}; use one of sgm.modules.diffusionmodules.sampling_utils"
            ) from error

    def prepare_inputs(
        self, x: Tensor, s: Tensor, c: Cond, uc: Cond | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the network's inputs for twice the batch, the unconditional half first.

        Raises:
            UserError: the two conditionings do not have the same kinds of tensors.
        """
        if uc is None or uc.keys() != c.keys():
            raise UserError(
                f"guidance: the unconditional conditioning has {sorted(uc or ())}; it needs the same kinds as the "
                f"conditional one, {sorted(c)}"
            )
        return torch.cat([x, x]), torch.cat([s, s]), {kind: torch.cat([uc[kind], c[kind]]) for kind in c}

    def weight(self, scale: float | Tensor, step_index: int | None, progress: float | None) -> float | Tensor:
        """Return the weight w of a step, a number or (batch,); the arguments are those of a call."""
        return scale

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        scale: float | Tensor | None = None,
        step_index: int | None = None,
        progress: float | None = None,
    ) -> Tensor:
        """Return the guided estimate (batch, ...) from the two halves of `x`.

        Args:
            x: (2·batch, ...) denoised samples, in the order of `prepare_inputs`.
            sigma: (batch,) noise levels, for guidance that depends on the noise.
            scale: replaces the guider's own scale; a number, or a (batch,) tensor.
            step_index: num_steps − timestep, with the sampler's configured num_steps, for `DynamicCFG`.
            progress: the share of the steps that is done, 0 ≤ progress < 1.
        """
        weight = self.weight(self.scale if scale is None else scale, step_index, progress)
        uncond, cond = x.chunk(2)
        return self.dyn_thresh(uncond, cond, weight)


COUNTS = ("timestep", "diffusers", "step")


class DynamicCFG(VanillaCFG):
    """Classifier-free guidance with the weight 1 + scale·(1 − cos(π·f^exp))/2.

    Args:
        exp: exponent; a whole number unless `count` is "step", since f may be negative.
        num_steps: number of sampling steps that the weights are made for.
        dyn_thresh_config: see `VanillaCFG`.
        count: definition of f. "timestep": (num_steps − timestep)/num_steps, mostly negative, for any number of steps
            taken; the released models use it. "diffusers": (n − timestep)/n for n steps taken, as `use_dynamic_cfg` of
            diffusers; equal to "timestep" if n is num_steps. "step": the share of the steps done.

    Raises:
        UserError: `count` is another word, or `exp` is fractional for a negative f.
    """

    def __init__(
        self,
        scale: float,
        exp: float,
        num_steps: int,
        dyn_thresh_config: Mapping[str, Any] | None = None,
        count: str = "timestep",
    ):
        super().__init__(scale, dyn_thresh_config)
        if count not in COUNTS:
            raise UserError(f"DynamicCFG: count: got '{count}'; use one of {', '.join(map(repr, COUNTS))}")
        if count != "step" and exp != int(exp):
            raise UserError(f"DynamicCFG: exp: got {exp}; expected a whole number unless count is 'step'")
        self.exp = exp
        self.num_steps = num_steps
        self.count = count

    def weight(self, scale: float | Tensor, step_index: int | None, progress: float | None) -> float | Tensor:
        # Python floats, since the cosine's argument needs their precision for large f.
        if self.count != "timestep":
            told, fraction = "progress" if self.count == "step" else "shortfall", progress
        else:
            told, fraction = "step_index", None if step_index is None else step_index / self.num_steps
        if fraction is None:
            raise UserError(f"DynamicCFG: the sampler does not pass {told}, which count '{self.count}' needs")
        return 1 + scale * (1 - math.cos(math.pi * fraction**self.exp)) / 2

    def __call__(  # type: ignore[override]  # the places of its arguments are those of the first release
        self,
        x: Tensor,
        sigma: Tensor,
        step_index: int | None = None,
        scale: float | Tensor | None = None,
        progress: float | None = None,
        shortfall: float | None = None,
    ) -> Tensor:
        """Return the guided estimate from the two halves of `x`, see `VanillaCFG`.

        Args:
            shortfall: (n − timestep)/n for the n steps that are taken.
        """
        return super().__call__(x, sigma, scale, step_index, shortfall if self.count == "diffusers" else progress)


def guided_estimate(
    guider: Any,
    denoiser: Callable[..., Tensor],
    x: Tensor,
    level: Tensor,
    cond: Cond,
    uc: Cond | None,
    model_inputs: Mapping[str, Tensor],
    told: Mapping[str, Any],
) -> Tensor:
    """Return the guided estimate of the clean samples, float32, from one run of the network.

    Args:
        denoiser: called as `denoiser(x, level, cond, **model_inputs)`, see `Denoiser.forward`.
        x, level: (batch, ...) noisy samples, and their noise levels (batch,).
        cond, uc: conditional and unconditional conditioning by kind, (batch, ...) each.
        model_inputs: the network's other inputs, (batch, ...) each, the same for both halves of a guided batch.
        told: values that a guider can ask for by keyword, see `guider_keywords`.
    """
    inputs = guider.prepare_inputs(x, level, cond, uc)
    copies = len(inputs[0]) // len(x)
    denoised = denoiser(*inputs, **{name: torch.cat([value] * copies) for name, value in model_inputs.items()})
    return guider(denoised.float(), level, **{name: told[name] for name in guider_keywords(guider)})


def guider_keywords(guider: Callable[..., Tensor]) -> set[str]:
    """Return the keywords that a guider takes besides the samples and their levels.

    `VanillaCFG` and `DynamicCFG` describe the keywords; a guider written for another sampler may take fewer.
    """
    names = {"scale", "step_index", "progress", "shortfall"}
    parameters = inspect.signature(guider).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return names
    return names & {parameter.name for parameter in parameters}
