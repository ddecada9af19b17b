"""Set single keys of a configuration, `--set model.….scale=7`, on top of all files.

Nothing here imports PyTorch.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from cogvideox_sat.configuration.merging import merge_into, written_out
from cogvideox_sat.configuration.model_section import LORA_PLACES, MODEL_KEYS, MODEL_PARTS, MODULES
from cogvideox_sat.configuration.static_signatures import static_parameters
from cogvideox_sat.configuration.yaml_reading import parse_yaml
from sgm.config_places import SECTIONS, Key, Sources, dotted, parse_key
from sgm.errors import UserError, shown

FLAG = "--set"
OBJECT_KEYS = ("target", "params")
OF_OTHERS = ("args", "data", "deepspeed", "lightning")  # sections whose keys are checked where they are read
PLAIN = (str, int, float, bool, type(None))


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Return the keys and values of texts `KEY=VALUE`; values are written as in YAML.

    Raises:
        UserError: a text has another form, or its value is not YAML.
    """
    settings = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise UserError(f"{FLAG} {text}: expected KEY=VALUE, such as model.scale_factor=0.7")
        settings[key.strip()] = parse_yaml(value, f"{FLAG} {key.strip()}")
    return settings


def set_keys(config: dict[str, Any], sources: Sources, settings: Mapping[str, Any]) -> None:
    """Set keys in the merged content of configuration files, before references are replaced.

    A mapping is merged into an existing one; any other value replaces the existing value.

    Raises:
        UserError: the configuration cannot have a key, or a value is not one that YAML can hold.
    """
    for name, value in settings.items():
        key = parse_key(str(name))
        if not key or key[0] not in SECTIONS:
            refuse(str(name), f"the section {shown(str(key[0]) if key else '')} does not exist", str(name), SECTIONS)
        config.setdefault(str(key[0]), {})
        holder = _holder(config, key, sources)
        value = _plain(value, dotted(key))
        if isinstance(holder, list):
            holder[_index(holder, key)] = value
            sources.replace(key, FLAG)
        elif len(key) == 1 and not isinstance(value, dict):
            raise UserError(f"{FLAG} {name}: got {shown(value)}; expected keys and values")
        else:
            content: dict[Any, Any] = {key[-1]: value}
            merge_into(holder, content, key[:-1], FLAG, config, sources)


def _holder(config: dict[Any, Any], key: Key, sources: Sources) -> dict[Any, Any] | list[Any]:
    """Return the mapping or list that holds the last part of a key, making missing mappings."""
    node: Any = config
    above: Any = None
    for length, part in enumerate(key):
        place = key[:length]
        if isinstance(node, list):
            if length == len(key) - 1:
                return node
            above, node = node, node[_index(node, key[: length + 1])]
            continue
        if not isinstance(node, dict):
            raise UserError(f"{FLAG} {dotted(key)}: {dotted(place)} is {shown(node)}, which has no keys below it")
        if part not in node and place:
            _check_new(node, above, key[: length + 1])
        if length == len(key) - 1:
            return node
        below = node.get(part)
        if isinstance(below, str) and "${" in below:
            below = written_out(config, sources, key[: length + 1])
        node[part] = {} if below is None else below
        above, node = node, node[part]
    return config


def _index(items: list[Any], key: Key) -> int:
    index = key[-1]
    if not isinstance(index, int) or index >= len(items):
        raise UserError(f"{FLAG} {dotted(key)}: {dotted(key[:-1])} is a list of {len(items)}; give a number below that")
    return index


def _check_new(node: Mapping[str, Any], above: Any, key: Key) -> None:
    """Check that a mapping can have a key that it does not have yet."""
    known = _known(node, above, key[:-1])
    if known is not None and key[-1] not in known:
        refuse(dotted(key), f"{dotted(key[:-1])} has no {shown(str(key[-1]))}", str(key[-1]), {*known, *node})


def _known(node: Mapping[str, Any], above: Any, place: Key) -> Collection[str] | None:
    """Return the keys that the mapping at a place can have; None if it can have any."""
    if place[0] in OF_OTHERS:
        return None
    if place == ("model",) and "params" not in node:
        return (*MODEL_PARTS, *MODEL_KEYS, "lora_config")
    if isinstance(node.get("target"), str) and place[-1] != "params":
        return (*OBJECT_KEYS, *(("lora_config",) if place[1:] in LORA_PLACES else ()), *node)
    if place[-1] == "params" and isinstance(above, Mapping) and isinstance(above.get("target"), str):
        taken = static_parameters(above["target"])
        return taken.hints if taken is not None and taken.closed else None
    if place[1:] == LORA_PLACES[-1]:
        return MODULES
    return OBJECT_KEYS if str(place[-1]).endswith("_config") else None


def refuse(key: str, problem: str, name: str, known: Collection[Any]) -> NoReturn:
    """Raise a UserError about a key that does not exist, suggesting the most similar one."""
    names = sorted(map(str, known))
    near = difflib.get_close_matches(name.partition(".")[0] if name == key else name, names, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]}?" if near else f"it can be {', '.join(names[:12])}"
    raise UserError(f"{FLAG} {key}: {problem}; {advice}")


def _plain(value: Any, key: str) -> Any:
    """Return a value as YAML would hold it: tuples become lists."""
    if isinstance(value, Mapping):
        return {str(name): _plain(child, f"{key}.{name}") for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child, f"{key}[{index}]") for index, child in enumerate(value)]
    if not isinstance(value, PLAIN):
        raise UserError(f"{FLAG} {key}: {shown(value)} is a {type(value).__name__}; give a number, a text or a list")
    return value
