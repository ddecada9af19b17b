"""Where values of a configuration are from: which file set a key, and which object is being built of it.

`Sources` is kept beside a merged configuration. `section` says which part of which configuration is being built from;
`sgm.util.instantiate_from_config` finds the place of what it builds in there, so that constructors need not pass keys
to each other.
"""

import re
from collections.abc import Container, Iterator, Mapping, Sequence
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
    """Return a key as it is written: `model.conditioner_config.params.emb_models[0].target`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return text.removeprefix(".")


def parse_key(text: str) -> Key:
    """Return the parts of a dotted key; the opposite of `dotted`, which also takes `emb_models.0`."""
    parts = re.findall(r"[^.\[\]]+", text)
    return tuple(int(part) if part.isdecimal() else part for part in parts)


class Sources:
    """Which file set a key of a merged configuration last.

    All are equal: settings are the same wherever they are from.
    """

    def __init__(self, names: Sequence[str | Path] = ()):
        self.names = [str(name) for name in names]
        self._files: dict[Key, str] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sources)

    __hash__ = None

    def set(self, key: Key, file: str | Path) -> None:
        """Record that `file` set `key`."""
        self._files[key] = str(file)

    def replace(self, key: Key, file: str | Path) -> None:
        """Record that `file` put something else in the place of all that was at `key`."""
        for old in [old for old in self._files if old[: len(key)] == key]:
            del self._files[old]
        self.set(key, file)

    def file_of(self, key: Sequence[str | int]) -> str | None:
        """Return the file that set `key`, or for a key that no file has, the file that set what contains it."""
        for length in range(len(key), 0, -1):
            if (file := self._files.get(tuple(key[:length]))) is not None:
                return file
        return " and ".join(self.names) or None

    def place(self, key: Sequence[str | int]) -> str:
        """Return `FILE: KEY`, as messages about a value begin."""
        file = self.file_of(key)
        return f"{file}: {dotted(key)}" if file else dotted(key)

    @contextmanager
    def naming(self, given: Container[str] = ()) -> Iterator[None]:
        """Within the block, put the file before the message of a UserError that begins with a key.

        Such messages begin with `SECTION: KEY`, `SECTION.KEY` or, for an argument, `KEY is`.

        Args:
            given: arguments of the command line, which are from no file.
        """
        try:
            yield
        except ConfigError:
            raise
        except UserError as error:
            key = key_of_message(str(error))
            if key is None or (key[0] == "args" and len(key) > 1 and key[1] in given):
                raise
            if key[0] == "args" and tuple(key[:2]) not in self._files and not str(error).startswith("args"):
                raise  # a default
            if not (file := self.file_of(key)):
                raise
            raise ConfigError(f"{file}: {error}") from error


def key_of_message(message: str) -> Key | None:
    """Return the key that a message begins with; None if it begins otherwise."""
    if match := re.match(rf"({'|'.join(SECTIONS)})(?:: (?:unknown key '|unknown )?|\.)([\w.\[\]]*\w\]?)", message):
        return (match[1], *parse_key(match[2]))
    if match := re.match(r"(\w+) is ", message):
        return ("args", match[1])
    return None


@dataclass(frozen=True)
class Place:
    """The object that is being built: where its configuration is, and that configuration itself."""

    key: Key
    config: Any
    sources: Sources | None = None

    def __str__(self) -> str:
        return self.sources.place(self.key) if self.sources else dotted(self.key)

    def below(self, *parts: str | int) -> "Place":
        """Return the place of a key below this one."""
        return Place((*self.key, *parts), None, self.sources)

    def find(self, config: Any) -> Key | None:
        """Return the key, relative to this place, at which `config` stands; None where it is not found."""
        for same in (lambda node: node is config, lambda node: node == config):
            found = next((key for key, node in walk(self.config) if key and same(node)), None)
            if found is not None:
                return found
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
    """Return the place of what is being built; None outside of any configuration."""
    return _current.get()


@contextmanager
def within(place: Place) -> Iterator[None]:
    """Within the block, what is built is at `place` or below it."""
    token = _current.set(place)
    try:
        yield
    finally:
        _current.reset(token)


def section(name: str, config: Any, sources: Sources | None) -> Any:
    """Return a context in which objects are built of the section `name` of a configuration, such as `model`."""
    return within(Place((name,), config, sources))
