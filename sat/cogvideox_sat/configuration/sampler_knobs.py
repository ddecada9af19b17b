"""Apply a request's changes to the configured sampler: another sampler, other guidance.

A knob means the same as the keys of the configuration that it stands for: `changed_sampler` returns the section with
these keys set. Weights are not involved. Nothing here imports PyTorch.
"""

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cogvideox_sat.configuration.static_signatures import static_parameters
from sgm.errors import UserError, shown

MODULE = "sgm.modules.diffusionmodules.sampling"
GUIDERS = "sgm.modules.diffusionmodules.guiders"
# Classes by short name. The first group takes any noise schedule, the second only those of sigma, unlike CogVideoX's.
VIDEO_SAMPLERS = {
    "dpmpp_2m_sde": "VPSDEDPMPP2MSampler",
    "dpmpp_2m": "VPODEDPMPP2MSampler",
    "ddim": "VideoDDIMSampler",
    "ddpm": "VideoDDPMSampler",
}
SIGMA_SAMPLERS = {
    "euler": "EulerEDMSampler",
    "heun": "HeunEDMSampler",
    "euler_ancestral": "EulerAncestralSampler",
    "dpmpp_2s_ancestral": "DPMPP2SAncestralSampler",
    "sigma_dpmpp_2m": "DPMPP2MSampler",
    "sigma_dpmpp_2m_sde": "SDEDPMPP2MSampler",
    "sigma_ddim": "DDIMSampler",
    "linear_multistep": "LinearMultistepSampler",
}
SAMPLERS = VIDEO_SAMPLERS | SIGMA_SAMPLERS
SCHEDULE_MODULE = "sgm.modules.diffusionmodules.discretizer"
USUAL_STEPS = 1000  # steps of a noise schedule
ALPHA_SCHEDULE = "ZeroSNRDDPMDiscretization"
# Schedules of guidance; all except "constant" are `count` of `DynamicCFG`.
SCHEDULES = (
    "timestep",
    "diffusers",
    "step",
    "constant",
)
USUAL_EXPONENT = 5  # of `DynamicCFG`, if the configuration names another guider
# Parameters of all samplers; others are specific to a class.
SHARED_PARAMETERS = ("discretization_config", "num_steps", "guider_config", "verbose", "device", "guidance_interval")
VIDEO_PARAMETERS = ("fixed_frames", "sdedit")  # parameters of `VIDEO_SAMPLERS`


@dataclass(frozen=True)
class SamplerKnobs:
    """Changes of a request to the configured sampler; None: no change.

    Attributes:
        sampler: one of `SAMPLERS`, by its short name or its class; stored as the class.
        guidance_scale: `scale` of the guider.
        guidance_interval: two shares of the steps; guidance is on between them; see `Sampler`.
        guidance_schedule: how the strength of guidance changes over the steps: one of `SCHEDULES`.

    Raises:
        UserError: the sampler does not exist.
    """

    sampler: str | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_schedule: str | None = None

    def __post_init__(self) -> None:
        if self.sampler is not None:
            object.__setattr__(self, "sampler", sampler_class(self.sampler))

    @classmethod
    def of(cls, settings: Any) -> "SamplerKnobs":
        """Return the knobs that are attributes of an object, such as the arguments of a run."""
        values = {name: getattr(settings, name) for name in KNOBS}
        interval = values["guidance_interval"]
        first, last = interval or (None, None)
        return cls(**{**values, "guidance_interval": None if first is None else (first, last)})

    def over(self, others: "SamplerKnobs") -> "SamplerKnobs":
        """Return these knobs; knobs that are None are taken from `others`."""
        return SamplerKnobs(**{**others.given(), **self.given()})

    def given(self) -> dict[str, Any]:
        """Return the knobs that are not None, by name."""
        return {name: value for name in KNOBS if (value := getattr(self, name)) is not None}


NO_KNOBS = SamplerKnobs()
KNOBS = tuple(f.name for f in fields(SamplerKnobs))


def sampler_class(name: str) -> str:
    """Return the class of a sampler, given by its short name, its class or its import path.

    Raises:
        UserError: the sampler does not exist.
    """
    plain = name.removeprefix(f"{MODULE}.")
    known = {**SAMPLERS, **{kind: kind for kind in SAMPLERS.values()}}
    found = known.get(plain) or known.get(plain.replace("-", "_").lower())
    if found is None:
        near = difflib.get_close_matches(plain, known, n=1) or difflib.get_close_matches(plain.lower(), SAMPLERS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"it can be {', '.join(SAMPLERS)}, or a class of {MODULE}"
        raise UserError(f"sampler: got {shown(name)}; {advice}")
    return found


def samplers_for(section: Mapping[str, Any]) -> dict[str, str]:
    """Return the samplers that fit the noise schedule of a `sampler_config`, by short name."""
    return VIDEO_SAMPLERS if _is_alpha_schedule(section) else SAMPLERS


def short_name(section: Mapping[str, Any]) -> str:
    """Return the short name of a configured sampler, or its class if it has no short name."""
    target = str(section.get("target"))
    names = {f"{MODULE}.{kind}": name for name, kind in SAMPLERS.items()}
    return names.get(target, target)


def usual_knobs(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the knobs of the configured sampler, which hold if a request gives none."""
    guider = _guider(section)
    params = guider.get("params") or {} if guider else {}
    usual: dict[str, Any] = {"sampler": short_name(section)}
    if "scale" in params:
        usual["guidance_scale"] = params["scale"]
        usual["guidance_interval"] = _params(section).get("guidance_interval") or [0.0, 1.0]
        is_dynamic = str(guider["target"]).endswith(".DynamicCFG") if guider else False
        usual["guidance_schedule"] = params.get("count", SCHEDULES[0]) if is_dynamic else "constant"
    return usual


def changed_sampler(section: Mapping[str, Any], knobs: SamplerKnobs) -> dict[str, Any]:
    """Return a `sampler_config` with the keys set that the knobs stand for.

    Raises:
        UserError: the configured sampler or its guider has no such key.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(section))
    params = changed["params"] = dict(_params(changed))
    if knobs.sampler is not None:
        kind = sampler_class(knobs.sampler)
        if kind in SIGMA_SAMPLERS.values() and _is_alpha_schedule(section):
            raise UserError(
                f"sampler is {shown(knobs.sampler)}, which needs a noise schedule of sigma, and this model has "
                f"{ALPHA_SCHEDULE}; choose one of {', '.join(VIDEO_SAMPLERS)}"
            )
        if changed.get("target") != f"{MODULE}.{kind}":
            changed["target"] = f"{MODULE}.{kind}"
            kept = (*SHARED_PARAMETERS, *(VIDEO_PARAMETERS if kind in VIDEO_SAMPLERS.values() else ()))
            changed["params"] = params = {name: params[name] for name in kept if name in params}
    if knobs.guidance_scale is not None:
        _own_guider(changed, "guidance_scale")["params"]["scale"] = knobs.guidance_scale
    if knobs.guidance_schedule is not None:
        _reschedule(changed, knobs.guidance_schedule)
    if knobs.guidance_interval is not None:
        _own_guider(changed, "guidance_interval")
        taken = static_parameters(str(changed.get("target")))
        if taken is None or "guidance_interval" not in taken.hints:
            raise UserError(
                f"guidance_interval: the sampler {short_name(changed)} does not take it; choose another `sampler`"
            )
        params["guidance_interval"] = list(knobs.guidance_interval)
    return changed


def most_steps(section: Mapping[str, Any]) -> int | None:
    """Return the number of steps of a configured noise schedule; None if it is not ours."""
    schedule = _params(section).get("discretization_config")
    if not isinstance(schedule, Mapping) or not str(schedule.get("target")).startswith(f"{SCHEDULE_MODULE}."):
        return None
    most = (schedule.get("params") or {}).get("num_timesteps", USUAL_STEPS)
    return most if type(most) is int else None


def check_steps(section: Mapping[str, Any], steps: int | None, name: str) -> None:
    """Check that a sampler can take this many steps, as far as its configuration shows.

    Args:
        steps: None: the sampler's own number.
        name: the argument that the message is about.

    Raises:
        UserError: the noise schedule has fewer steps.
    """
    most = most_steps(section)
    if steps is not None and most is not None and steps > most:
        raise UserError(f"{name}: got {steps}; this model's noise schedule has 1 to {most} steps")


def _reschedule(section: dict[str, Any], schedule: str) -> None:
    """Change how the strength of guidance changes over the steps."""
    guider = _own_guider(section, "guidance_schedule")
    params, name = guider["params"], str(guider["target"]).removeprefix(f"{GUIDERS}.")
    if name not in ("DynamicCFG", "VanillaCFG"):
        raise UserError(f"guidance_schedule: {guider['target']} has no schedule to choose; leave it out")
    if schedule == "constant":
        kept = {key: params[key] for key in ("scale", "dyn_thresh_config") if key in params}
        section["params"]["guider_config"] = {"target": f"{GUIDERS}.VanillaCFG", "params": kept}
        return
    guider["target"] = f"{GUIDERS}.DynamicCFG"
    params["count"] = schedule
    params.setdefault("exp", USUAL_EXPONENT)
    params.setdefault("num_steps", section["params"].get("num_steps") or 50)


def _own_guider(section: Mapping[str, Any], knob: str) -> dict[str, Any]:
    """Return the guider of a copied `sampler_config`; its `params` may be changed.

    Raises:
        UserError: the sampler has no guider with a scale.
    """
    guider = _guider(section)
    if guider is None or "scale" not in (guider.get("params") or {}):
        kind = str(guider["target"]).rpartition(".")[2] if guider else "no guider"
        raise UserError(f"{knob}: this model is sampled without guidance ({kind} in sampler_config); leave it out")
    return guider


def _guider(section: Mapping[str, Any]) -> dict[str, Any] | None:
    guider = _params(section).get("guider_config")
    return guider if isinstance(guider, dict) and isinstance(guider.get("target"), str) else None


def _params(section: Mapping[str, Any]) -> Mapping[str, Any]:
    params = section.get("params")
    return params if isinstance(params, Mapping) else {}


def _is_alpha_schedule(section: Mapping[str, Any]) -> bool:
    schedule = _params(section).get("discretization_config")
    return isinstance(schedule, Mapping) and str(schedule.get("target")).endswith(f".{ALPHA_SCHEDULE}")
