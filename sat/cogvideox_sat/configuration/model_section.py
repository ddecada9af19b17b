"""Bring the `model:` section of a configuration into the one form that this project reads.

Files written for the original may have another form, and programs pass the section as an OmegaConf object. Nothing here
imports PyTorch.
"""

import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cogvideox_sat.configuration.similar_names import nearest
from sgm.errors import UserError

MODULES = ("pos_embed_config", "patch_embed_config", "adaln_layer_config", "final_layer_config", "lora_config")
MODEL_PARTS = ("network_config", "denoiser_config", "sampler_config", "conditioner_config", "first_stage_config")
# Other keys that the engine reads, and keys of released files that ask for what is done in any case.
MODEL_KEYS = (
    "target",
    *("scale_factor", "log_keys", "input_key", "latent_input", "not_trainable_prefixes"),
    *("noised_image_input", "noised_image_all_concat", "noised_image_dropout", "conditioning"),
    *("loss_fn_config", "network_wrapper", "compile_model"),
    *("disable_first_stage_autocast", "en_and_decode_n_samples_a_time"),
)
NETWORK = "dit_video_concat.DiffusionTransformer"
# Places where an adapter may be described; the network reads the last one.
LORA_PLACES = ((), ("network_config",), ("network_config", "params"), ("network_config", "params", "modules"))
ALL = "all"  # in not_trainable_prefixes: everything except an adapter


def plain_model_section(section: Any) -> Mapping[str, Any]:
    """Return the `model:` section as plain mappings and lists, with its adapter in one place.

    The adapter's place is `network_config.params.modules`. A section that has this form already is returned itself, any
    other as a copy.

    Args:
        section: a mapping, or an OmegaConf `DictConfig`.

    Raises:
        UserError: the section is not a mapping, references do not resolve, or it describes two different adapters.
    """
    section = plain(section, "model")
    if not isinstance(section, Mapping):
        raise UserError(f"model: got {section!r}; expected keys and values")
    found = {place: inner["lora_config"] for place in LORA_PLACES if "lora_config" in (inner := _at(section, place))}
    described = {place: lora for place, lora in found.items() if lora is not None}
    if found.keys() <= {LORA_PLACES[-1]} and len(described) == len(found):
        return section
    adapters = list(described.values())
    if any(adapter != adapters[0] for adapter in adapters):
        names = " and ".join(".".join(("model", *place, "lora_config")) for place in described)
        raise UserError(f"{names} describe different adapters; keep one of them")
    for place in found:
        section = _without_adapter(section, place)
    return _with_adapter(section, LORA_PLACES[-1], adapters[0]) if adapters else section


def conditions_on_key_frames(section: Mapping[str, Any]) -> bool:
    """Return whether a model's `conditioning` shows the network other frames than the first."""
    weights = section.get("conditioning")
    if not section.get("noised_image_input") or not isinstance(weights, Mapping):
        return False
    return any(weights.get(kind) for kind in ("first_last", "random"))


def samples_at_a_time(value: Any) -> int | None:
    """Return `en_and_decode_n_samples_a_time` of the `model:` section; None means all.

    Raises:
        UserError: the value is not a whole number from 1.
    """
    if value is not None and (type(value) is not int or value < 1):
        raise UserError(
            f"model.en_and_decode_n_samples_a_time: {value!r} does not fit; give a whole number from 1, or leave it out"
        )
    return value


def plain(value: Any, name: str) -> Any:
    """Return an OmegaConf object as plain mappings and lists, any other value unchanged.

    Args:
        name: the value in messages.

    Raises:
        UserError: references do not resolve.
    """
    if "omegaconf" not in sys.modules:  # without it imported, nothing is such an object
        return value
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not OmegaConf.is_config(value):
        return value
    try:
        return OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{name}: {str(error).splitlines()[0]}") from error


def without_adapter(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `model:` section without `lora_config`, for adapters that describe themselves.

    Raises:
        UserError: as `plain_model_section`.
    """
    return _without_adapter(plain_model_section(section), LORA_PLACES[-1])


def has_adapter(section: Mapping[str, Any]) -> bool:
    """Return whether the `model:` section, in its plain form, describes an adapter."""
    return "lora_config" in _at(section, LORA_PLACES[-1])


def not_trainable_prefixes(section: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the beginnings of the names of parameters that are not trained.

    Raises:
        UserError: the prefixes are not texts.
    """
    prefixes = section.get("not_trainable_prefixes")
    if prefixes is None:
        return ("first_stage_model", "conditioner")
    prefixes = [prefixes] if isinstance(prefixes, str) else prefixes
    if not isinstance(prefixes, list | tuple) or not all(isinstance(prefix, str) and prefix for prefix in prefixes):
        raise UserError(f"model.not_trainable_prefixes: got {prefixes!r}; expected a list of beginnings of names")
    return tuple(prefixes)


def check_trained_part(section: Mapping[str, Any]) -> None:
    """Check that training would change some weights, else raise UserError."""
    if ALL in not_trainable_prefixes(section) and not has_adapter(section):
        raise UserError(
            "nothing is to be trained: model.not_trainable_prefixes is ['all'] and the model has no adapter; add "
            "model.lora_config, or remove 'all'"
        )


def check_modules(section: Mapping[str, Any]) -> None:
    """Check that our network knows all `modules` that are configured, else raise UserError."""
    network = section.get("network_config")
    if not isinstance(network, Mapping) or network.get("target") != NETWORK:
        return
    for name in _at(section, LORA_PLACES[-1]):
        if name not in MODULES:
            near = difflib.get_close_matches(str(name), MODULES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(MODULES)}"
            raise UserError(f"model.network_config.params.modules: unknown key '{name}'; {hint}")


def unused_model_keys(section: Mapping[str, Any], parts: Sequence[str] = MODEL_PARTS) -> list[str]:
    """Return a sentence for the log about each key of the `model:` section that nothing reads.

    Raises:
        UserError: the section does not describe a part of the model.
    """
    for part in parts:
        if not isinstance(section.get(part), dict):
            raise UserError(f"model.{part}: missing; name a model's file too, as in --help")
    unused, known = [], [*MODEL_PARTS, *MODEL_KEYS]
    for key in section:
        if key not in known:
            unused.append(f"model.{key} is not used{nearest(str(key), known, otherwise='', least=0.6)}")
    return unused


def _at(section: Any, place: tuple[str, ...]) -> Mapping[str, Any]:
    """Return the mapping at a place; an empty one if there is something else."""
    for name in place:
        section = section.get(name) if isinstance(section, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def _without_adapter(section: Mapping[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    if not place:
        return {name: value for name, value in section.items() if name != "lora_config"}
    inner = section.get(place[0])
    return {**section, place[0]: _without_adapter(inner, place[1:])} if isinstance(inner, Mapping) else dict(section)


def _with_adapter(section: Mapping[str, Any], place: tuple[str, ...], adapter: Any) -> dict[str, Any]:
    if not place:
        return {**section, "lora_config": adapter}
    inner = section.get(place[0])
    if not isinstance(inner, Mapping):
        raise UserError(f"model.lora_config needs model.{'.'.join(LORA_PLACES[-1])}; name a model's file too")
    return {**section, place[0]: _with_adapter(inner, place[1:], adapter)}
