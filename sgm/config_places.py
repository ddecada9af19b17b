"""Track where values of a configuration are from: which file set a key, and which object is being built from it.

`Sources` is kept beside a merged configuration. `section` says which part of which configuration is being built from;
`sgm.util.instantiate_from_config` finds the place of what it builds in there, so that constructors need not pass keys
to each other.
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
    """Return a key as it is written: `model.conditioner_config.params.emb_models[0].target`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return text.removeprefix(".")


def parse_key(text: str) -> Key:
    """Return the parts of a dotted key; the opposite of `dotted`, which also takes `emb_models.0`."""
    parts = re.findall(r"[^.\[\]]+", text)
    return tuple(int(part) if part.isdecimal() else part for part in parts)


class Sources:
    """The files that last set each key of a merged configuration.

    All are equal: settings are the same wherever they are from.
    """

    def __init__(self, names: Sequence[str | Path] = ()):
        self.names = [str(name) for name in names]
        self.given: set[str] = set()  # arguments of the command line, which are from no file
        self.arguments: set[str] = set()  # all that the command has
        self._files: dict[Key, str] = {}
        # Builds (and uses) what a shipped file has at a key for the same class; returns what that raises. See
        # `config_blame`.
        self.build_reference: Callable[..., Exception | None] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sources)

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
    def naming(self, given: Iterable[str] = ()) -> Iterator[None]:
        """Put the file before the message of a UserError of the block that names a key.

        Such messages begin with `SECTION: KEY`, `SECTION.KEY` or an argument's name, or have a dotted key in them.

        Args:
            given: arguments of the command line, also for later blocks.
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
        """Return the key that a message is about; None if it names none, or one that is from no file."""
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
    """A place in a configuration, and what stands there.

    Args:
        building: an object is being built of it.
        found: False where it is not known where in `key` the configuration stands.
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
        """Return whether this place can be named in a message."""
        return bool(self.key) and self.key[0] in SECTIONS

    @property
    def slot(self) -> str | None:
        """Return the name of the key at this place, or of the list for its items; None if it is not known."""
        if not self.found:
            return None
        return next((part for part in reversed(self.key) if isinstance(part, str)), None)

    def below(self, *parts: str | int) -> "Place":
        """Return the place of a key below this one."""
        return Place((*self.key, *parts), None, self.sources)

    def find(self, config: Any) -> Key | None:
        """Return the key, relative to this place, at which `config` stands; None where it is not found.

        A copy is found by its content, one that has been added to by its target.
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
    """Return the place of what is being built; None outside of any configuration."""
    return _current.get()


@contextmanager
def within(place: Place | None) -> Iterator[None]:
    """Let what is built within the block be at `place` or below; None: it is of no file."""
    token = _current.set(place)
    try:
        yield
    finally:
        _current.reset(token)


def section(name: str, config: Any, sources: Sources | None) -> Any:
    """Return a context in which objects are built of the section `name` of a configuration, such as `model`."""
    return within(Place((name,), config, sources))
