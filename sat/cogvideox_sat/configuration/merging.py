"""Merge configuration files and replace their references (`${args.load}`).

The file of each key is recorded, and the size of the result is bounded. Nothing here imports PyTorch.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cogvideox_sat.configuration.yaml_reading import MOST_BYTES, MOST_VALUES
from sgm.config_places import ConfigError, Key, Sources, dotted, parse_key
from sgm.errors import shown

_REFERENCE = re.compile(r"(?<!\\)\$\{([^${}]*)\}")  # an innermost reference
_WHOLE_REFERENCE = re.compile(r"\$\{[^${}]*\}")
DEEPEST_WALK = 120  # levels of nesting, including referenced content; Python's own limit is 1000 nested calls
NOT_GIVEN = "???"  # OmegaConf's mark for a value that another file must set


def merge_files(
    files: Sequence[tuple[Path, dict[str, Any]]], names: Sequence[str | Path]
) -> tuple[dict[str, Any], Sources]:
    """Return the merged content of files and the file that set each key.

    Later files override earlier ones. Mappings are merged key by key; any other value replaces the earlier one.

    Args:
        files: paths and contents; the contents are not changed.
        names: the files that the user named, for messages about a key that is in no file.

    Raises:
        UserError: a list meets a mapping.
    """
    merged: dict[str, Any] = {}
    sources = Sources(names)
    for path, content in files:
        _merge_mapping(merged, content, (), path, merged, sources)
    return merged, sources


def _merge_mapping(
    target: dict[str, Any], content: dict[str, Any], key: Key, file: Path, root: dict[str, Any], sources: Sources
) -> None:
    for name, value in content.items():
        at, old = (*key, name), target.get(name)
        if isinstance(value, dict) and isinstance(old, str) and _WHOLE_REFERENCE.fullmatch(old):
            # The file changes some keys of a mapping that is given by reference.
            target[name] = old = written_out(root, sources, at)
        if (isinstance(value, list) and isinstance(old, dict)) or (isinstance(value, dict) and isinstance(old, list)):
            kinds = {list: "a list", dict: "keys and values"}
            raise ConfigError(
                f"{file}: {dotted(at)}: cannot merge: {kinds[type(value)]} in the place of {kinds[type(old)]}"
            )
        if isinstance(value, dict) and isinstance(old, dict):
            sources.set(at, file)
            _merge_mapping(old, value, at, file, root, sources)
        elif value != NOT_GIVEN or name not in target:
            target[name] = copy.deepcopy(value)
            sources.replace(at, file)
            if isinstance(value, dict):
                _record(value, at, file, sources)


def merge_into(
    target: dict[str, Any], content: dict[str, Any], key: Key, file: str, root: dict[str, Any], sources: Sources
) -> None:
    """Merge content into the mapping at a key of a merged configuration, as if from `file`.

    Args:
        root: the whole configuration.

    Raises:
        UserError: a list meets a mapping.
    """
    _merge_mapping(target, content, key, Path(file), root, sources)


def written_out(root: dict[str, Any], sources: Sources, key: Key) -> Any:
    """Return a copy of the value at a key, with references replaced.

    Raises:
        UserError: see `resolve`.
    """
    return copy.deepcopy(_Resolver(root, sources, trusted=True).at(key))


def _record(content: dict[str, Any], key: Key, file: Path, sources: Sources) -> None:
    for name, value in content.items():
        sources.set((*key, name), file)
        if isinstance(value, dict):
            _record(value, (*key, name), file, sources)


def resolve(
    config: dict[str, Any], sources: Sources, trusted: bool, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a configuration in which every reference is replaced by the value it refers to.

    `${args.load}` is a key from the top, `${.r}` one in the mapping that holds the reference, `${..r}` one in the
    mapping around that. `${oc.env:HOME}` and OmegaConf's other resolvers are left to OmegaConf.

    Args:
        trusted: the files may use such resolvers, which read environment variables.
        given: arguments of the command line by name: `${args.NAME}` is their value, whatever the files say.

    Raises:
        UserError: a reference leads to a key that does not exist, to itself, or to too many values.
    """
    return _Resolver(config, sources, trusted, given).at(())


class _Resolver:
    def __init__(self, root: dict[str, Any], sources: Sources, trusted: bool, given: Mapping[str, Any] | None = None):
        self.root, self.sources, self.trusted = root, sources, trusted
        self.given = {("args", name): value for name, value in (given or {}).items() if value is not None}
        self.done: dict[Key, Any] = {}
        self.open: list[Key] = []
        self.depth = 0
        self.written = 0  # values and characters that have replaced references

    def refuse(self, key: Key, problem: str) -> NoReturn:
        """Raise UserError about the reference in the value of a key."""
        raise ConfigError(f"{self.sources.place(key)}: cannot merge: {problem}")

    def at(self, key: Key) -> Any:
        """Return the value at a key with its references replaced."""
        if key not in self.done:
            node: Any = self.root
            for part in key:
                node = node[part]
            self.depth += 1
            if self.depth > DEEPEST_WALK:
                self.refuse(key, "nested too deeply once references are replaced; write it flatter")
            self.done[key] = self.expand(node, key)
            self.depth -= 1
        return self.done[key]

    def expand(self, node: Any, key: Key) -> Any:
        """Return a value with the references in it replaced."""
        if isinstance(node, dict):
            return {name: self.at((*key, name)) for name in node}
        if isinstance(node, list):
            return [self.at((*key, index)) for index in range(len(node))]
        if not isinstance(node, str) or "${" not in node:
            return node
        if key in self.open:
            self.refuse(key, f"{shown(node)} refers to itself")
        self.open.append(key)
        value = self.interpolate(node, key)
        self.open.pop()
        return value

    def interpolate(self, text: str, key: Key) -> Any:
        """Return a text with its references replaced; a lone reference becomes its value."""
        for _ in range(MOST_VALUES):
            match = _REFERENCE.search(text)
            if match is None:
                break
            value = self.referred(match[1].strip(), key)
            if match[0] == text:
                return self.copied(value, key)
            if isinstance(value, dict | list):
                self.refuse(key, f"{shown(match[0])} is {shown(value)}, which cannot be part of a text")
            text = f"{text[: match.start()]}{value}{text[match.end() :]}"
            self.written += len(str(value))
            if self.written > MOST_BYTES:
                self.refuse(key, f"references write out more than {MOST_BYTES >> 20} MiB of text")
        if re.search(r"(?<!\\)\$\{", text):
            self.refuse(key, f"{shown(text)} has a '${{' that is not closed; write '\\${{' for the characters alone")
        return text.replace("\\${", "${")

    def copied(self, value: Any, key: Key) -> Any:
        """Return a copy of a referenced value, after counting its values."""
        self.written += _count(value, self.refuse, key)
        if self.written > MOST_VALUES:
            self.refuse(key, f"references write out more than {MOST_VALUES} values")
        return copy.deepcopy(value)

    def referred(self, reference: str, key: Key) -> Any:
        """Return the value that a reference in the value of `key` leads to."""
        if ":" in reference:
            return self.resolver(reference, key)
        ups = len(reference) - len(reference.lstrip("."))
        if ups > len(key):
            self.refuse(key, f"{shown('${' + reference + '}')} leads above the top")
        path = (*key[: len(key) - ups], *parse_key(reference)) if ups else parse_key(reference)
        if path in self.given:
            return self.given[path]
        node: Any = self.root
        place: Key = ()
        for length, part in enumerate(path):
            if isinstance(node, str) and "${" in node:  # the path leads through another reference
                node = self.at(place)
                for rest in path[length:]:
                    node = node[self.step(node, rest, reference, key)]
                return node
            place = (*place, self.step(node, part, reference, key))
            node = node[place[-1]]
        if place == key[: len(place)]:
            self.refuse(key, f"{shown('${' + reference + '}')} refers to itself")
        return self.at(place)

    def step(self, node: Any, part: str | int, reference: str, key: Key) -> str | int:
        """Return the key or index of `node` that `part` of a reference stands for."""
        if isinstance(node, dict):
            for name in (part, str(part)):
                if name in node:
                    return name
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            return part
        self.refuse(key, f"{shown('${' + reference + '}')}: '{part}' does not exist")

    def resolver(self, reference: str, key: Key) -> Any:
        """Return the value of one of OmegaConf's resolvers, such as `oc.env:HOME`."""
        if not self.trusted:
            self.refuse(
                key, f"{shown('${' + reference + '}')} is not read from a file that came with a checkpoint or a video"
            )
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            return OmegaConf.to_container(OmegaConf.create({"value": f"${{{reference}}}"}), resolve=True)["value"]
        except OmegaConfBaseException as error:
            self.refuse(key, str(error).splitlines()[0])


def _count(value: Any, refuse: Any, key: Key) -> int:
    """Return the number of values in a nested value; refuse more than `MOST_VALUES`."""
    count, pending = 0, [value]
    while pending:
        node = pending.pop()
        count += 1
        if count > MOST_VALUES:
            refuse(key, f"references write out more than {MOST_VALUES} values")
        pending.extend(node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
    return count


def first_difference(theirs: Any, ours: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Return the first dotted key at which two trees of settings differ, and both values.

    The result is None if the trees are equal.
    """
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*theirs, *(ours.keys() - theirs.keys())]:
            difference = first_difference(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
            if difference:
                return difference
        return None
    return None if theirs == ours else (name, theirs, ours)
