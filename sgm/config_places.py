"""Track where values of a configuration are from, and which object is being built from it.

`Sources` records the file that set each key of a merged configuration. `section` tells which part of which
configuration objects are built from; `sgm.util.instantiate_from_config` finds the place of an object in this part, so
that constructors need not pass keys to each other.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgm.errors import UserError

Key = tuple[str | int, ...]
SECTIONS = ("args", "model", "deepspeed", "data", "lightning")


class ConfigError(UserError):
    """A UserError whose message begins with the file and the key that it is about."""


def dotted(key: Sequence[str | int]) -> str:
    """Return a key in dotted form: `model.conditioner_config.params.emb_models[0].target`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return text.removeprefix(".")


def parse_key(text: str) -> Key:
    """Return the parts of a dotted key, the inverse of `dotted`; `emb_models.0` works too."""
    parts = re.findall(r"[^.\[\]]+", text)
    return tuple(int(part) if part.isdecimal() else part for part in parts)


class Sources:
    """The files that last set each key of a merged configuration.

    All instances are equal, so that settings compare equal regardless of their files.
    """

    def __init__(self, names: Sequence[str | Path] = ()):
        self.names = [str(name) for name in names]
        self.given: set[str] = set()  # arguments given on the command line, which have no file
        self.arguments: set[str] = set()  # all arguments of the command
        self._files: dict[Key, str] = {}
        # Builds (and uses) the object that a shipped file has at a key for the same class; returns the exception. See
        # `config_blame`.
        self.build_reference: Callable[..., Exception | None] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sources)

    def set(self, key: Key, file: str | Path) -> None:
        """Record that `file` set `key`."""
        self._files[key] = str(file)

    def replace(self, key: Key, file: str | Path) -> None:
        """Record that `file` replaced everything at `key`."""
        for old in [old for old in self._files if old[: len(key)] == key]:
            del self._files[old]
        self.set(key, file)

    def file_of(self, key: Sequence[str | int]) -> str | None:
        """Return the file that set `key`, or else the file that set the innermost part around it."""
        for length in range(len(key), 0, -1):
            if (file := self._files.get(tuple(key[:length]))) is not None:
                return file
        return " and ".join(self.names) or None

    def place(self, key: Sequence[str | int]) -> str:
        """Return `FILE: KEY`, the beginning of messages about a value."""
        file = self.file_of(key)
        return f"{file}: {dotted(key)}" if file else dotted(key)

    @contextmanager
    def naming(self, given: Iterable[str] = ()) -> Iterator[None]:
        """Put the file in front of the message of a UserError in the block that names a key.

        Such messages begin with `SECTION: KEY`, `SECTION.KEY` or an argument's name, or contain a dotted key.

        Args:
            given: arguments of the command line, remembered for later blocks.
        """
        self.given |= set(given)
        try:
            yield
        except UserError as error:
            key = self.key_of_message(str(error))
            if type(error) is not UserError or key is None or not (file := self.file_of(key)):
                raise
            raise ConfigError(f"{file}: {error}") from error

    def key_of_message(self, message: str) -> Key | None:
        """Return the key that a message is about; None if it names no key of a file."""
        if match := _KEY.match(message) or _DOTTED_KEY.search(message):
            key = (match[1], *parse_key(match[2]))
            return None if key[0] == "args" and key[1] in self.given else key
        match = _ARGUMENT.match(message)
        if match and match[1] not in self.given and (("args", match[1]) in self._files or match[1] in self.arguments):
            return ("args", match[1])
        match = _ADVICE.search(message)
        if match and match[1] not in self.given and ("args", match[1]) in self._files:
            return ("args", match[1])
        return None


_NAMES = "|".join(SECTIONS)
_KEY = re.compile(rf"({_NAMES})(?:: (?:unknown key '|unknown )?|\.)([\w.\[\]]*\w\]?)")
_DOTTED_KEY = re.compile(rf"\b({_NAMES})\.(\w[\w.\[\]]*)")
_ARGUMENT = re.compile(r"(\w+)\b")
_ADVICE = re.compile(r"\b(?:set |or )(\w+): ")


@dataclass(frozen=True)
class Place:
    """A place in a configuration, and the value there.

    Args:
        building: an object is being built from it.
        found: False if the place of the configuration in `key` is unknown.
    """

    key: Key
    config: Any
    sources: Sources | None = None
    building: bool = False
    found: bool = True

    def __str__(self) -> str:
        return self.sources.place(self.key) if self.sources else dotted(self.key)

    @property
    def known(self) -> bool:
        """Return whether a message can name this place."""
        return bool(self.key) and self.key[0] in SECTIONS

    @property
    def slot(self) -> str | None:
        """Return the name of the key here, for items that of their list; None if unknown."""
        if not self.found:
            return None
        return next((part for part in reversed(self.key) if isinstance(part, str)), None)

    def below(self, *parts: str | int) -> "Place":
        """Return the place of a key below this one."""
        return Place((*self.key, *parts), None, self.sources)

    def find(self, config: Any) -> Key | None:
        """Return the key, relative to this place, of `config`; None if it is not found.

        A copy is found by its content, a copy with added keys by its target.
        """
        nodes = list(walk(self.config))
        for same in (lambda node: node is config, lambda node: node == config):
            if found := [key for key, node in nodes if same(node)]:
                return found[0]
        if isinstance(config, Mapping) and "target" in config:
            target = config["target"]
            found = [key for key, node in nodes if isinstance(node, Mapping) and node.get("target") == target]
            if len(found) == 1:
                return found[0]
        return None


def walk(node: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yield every mapping and list of a configuration with its key, outer ones first."""
    if isinstance(node, Mapping):
        yield key, node
        for name, child in node.items():
            yield from walk(child, (*key, name))
    elif isinstance(node, list | tuple):
        yield key, node
        for index, child in enumerate(node):
            yield from walk(child, (*key, index))


_current: ContextVar[Place | None] = ContextVar("place in the configuration", default=None)


def current_place() -> Place | None:
    """Return the place of the object being built; None outside of any configuration."""
    return _current.get()


@contextmanager
def within(place: Place | None) -> Iterator[None]:
    """Build objects within the block at `place` or below; None: they belong to no file."""
    token = _current.set(place)
    try:
        yield
    finally:
        _current.reset(token)


def section(name: str, config: Any, sources: Sources | None) -> Any:
    """Return a context in which objects are built from the section `name`, such as `model`."""
    return within(Place((name,), config, sources))
