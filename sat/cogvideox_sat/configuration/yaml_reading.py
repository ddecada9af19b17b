"""Read one YAML file from any source: plain values only, with bounded size and depth.

Content that aliases repeat counts as often as it is used. Nothing here imports PyTorch.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # PyYAML without LibYAML
    from yaml import SafeLoader

from sgm.errors import UserError, shown

MOST_BYTES = 4 * 2**20
MOST_VALUES = 200_000  # keys and values; the content of an alias counts as often as it is used
DEEPEST = 64  # levels of nesting; the configurations of released models have 12
MOST_DIGITS = 300  # digits of a whole number

_PREFIX = "tag:yaml.org,2002:"
_TAGS = {_PREFIX + name for name in ("str", "int", "float", "bool", "null", "map", "seq")}
_MERGE = _PREFIX + "merge"
_EXPONENT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")


class _Loader(SafeLoader):
    """Loader that reads `1e-3` as a number and dates as texts, as OmegaConf does."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _PREFIX + "timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(_PREFIX + "float", _EXPONENT, list("-+.0123456789"))


def read_yaml(path: str | Path, what: str = "configuration") -> Any:
    """Return the content of a YAML file.

    The content consists of dictionaries, lists, texts, numbers, booleans and None.

    Args:
        what: the kind of the file, for messages.

    Raises:
        UserError: the file is missing, unreadable, not UTF-8, not YAML, too large, nested too deeply, repeats a key, or
            holds a value of another kind.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > MOST_BYTES:
        raise UserError(f"{what} {path}: larger than {MOST_BYTES >> 20} MiB; name a text file of settings")
    try:
        return parse_yaml(content.decode("utf-8"), f"{what} {path}")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text; save it as UTF-8") from error


def parse_yaml(text: str, name: str) -> Any:
    """Return the content of a YAML text.

    Args:
        name: the source of the text in messages.

    Raises:
        UserError: as `read_yaml`.
    """
    try:
        _check_depth(text, name)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _Builder(loader, name).build(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        _refuse(name, mark, f"not valid YAML: {' '.join(problem.split())}")


def value_at(content: Any, *keys: str) -> Any:
    """Return the value below `keys` in nested mappings; None if one of them is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _refuse(name: str, mark: Any, problem: str) -> NoReturn:
    where = f", line {mark.line + 1}" if mark else ""
    raise UserError(f"{name}{where}: {problem}") from None


def _check_depth(text: str, name: str) -> None:
    """Check that a text is not nested too deeply for recursion, nor has too many values."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            _refuse(name, event.start_mark, f"nested deeper than {DEEPEST} levels; write it flatter")
        if count > 2 * MOST_VALUES:
            _refuse(name, event.start_mark, f"more than {MOST_VALUES} values; list clips in a manifest instead")


class _Builder:
    """Converter of YAML's nodes to values."""

    def __init__(self, loader: Any, name: str):
        self.loader, self.name = loader, name
        self.sizes: dict[int, int] = {}
        self.open: set[int] = set()

    def build(self, node: yaml.Node) -> Any:
        """Return the value of a whole file; refuse too many values."""
        if self.size(node) > MOST_VALUES:
            _refuse(
                self.name, node.start_mark, f"more than {MOST_VALUES} values once its aliases are expanded; use fewer"
            )
        return self.value(node)

    def size(self, node: yaml.Node) -> int:
        """Return the number of values below a node, with aliases expanded."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) in self.open:
            _refuse(self.name, node.start_mark, "an anchor that contains its own alias; remove that alias")
        if id(node) not in self.sizes:
            self.open.add(id(node))
            self.sizes[id(node)] = 1 + sum(self.size(child) for child in _children(node))
            self.open.remove(id(node))
        return self.sizes[id(node)]

    def value(self, node: yaml.Node) -> Any:
        """Return the value of a node; refuse types other than those of JSON."""
        if node.tag not in _TAGS:
            kind = node.tag.removeprefix(_PREFIX)
            _refuse(self.name, node.start_mark, f"a value of the type '{kind}'; write text, numbers, lists or keys")
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child) for child in node.value]
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node)
        return self.scalar(node)

    def mapping(self, node: yaml.MappingNode) -> dict[Any, Any]:
        """Return the keys and values of a node; refuse a key that is given twice."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.key(key_node)
            if key in seen:
                _refuse(self.name, key_node.start_mark, f"the key {shown(key)} is given twice; remove one of them")
            seen.add(key)
        self.loader.flatten_mapping(node)
        return {self.key(key_node): self.value(child) for key_node, child in node.value}

    def key(self, node: yaml.Node) -> Any:
        """Return a key, a text or a whole number; refuse any other."""
        key = self.value(node) if isinstance(node, yaml.ScalarNode) else None
        if type(key) not in (str, int):
            text = shown(node.value) if isinstance(node, yaml.ScalarNode) else "a list or a mapping"
            _refuse(self.name, node.start_mark, f"the key {text} is not a text; put it in double quotes")
        return key

    def scalar(self, node: yaml.ScalarNode) -> Any:
        """Return a text, number, truth value or None; refuse values without a meaning."""
        text = node.value
        if node.tag == _PREFIX + "int" and len(text) > MOST_DIGITS:
            _refuse(self.name, node.start_mark, f"a whole number of {len(text)} digits; at most {MOST_DIGITS} are read")
        try:
            value = self.loader.construct_object(node)
        except (ValueError, LookupError, OverflowError):  # `!!int abc`, `!!bool 7`
            kind = node.tag.removeprefix(_PREFIX)
            _refuse(self.name, node.start_mark, f"{shown(text)} is not a value of the type '{kind}'")
        if isinstance(value, float) and math.isnan(value):
            _refuse(self.name, node.start_mark, f"{text} is not a number; write a number or leave the key empty")
        if isinstance(value, str) and any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value):
            _refuse(self.name, node.start_mark, "a text with NUL or half of a surrogate pair; remove that character")
        return value


def _children(node: yaml.CollectionNode) -> Iterator[yaml.Node]:
    for child in node.value:
        if isinstance(child, tuple):
            yield from child
        else:
            yield child
