"""Declare arguments of a command as fields of a dataclass.

An argument is given on the command line (`--name value`) or in the `args:` section of a configuration file.
"""

import typing
from collections.abc import Callable, Sequence
from dataclasses import Field, field, fields
from types import UnionType
from typing import Any


def argument(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    read: Callable[[str, Any], Any] | None = None,
) -> Any:
    """Return a dataclass field that is an argument; other fields are not arguments.

    Args:
        help: the text for `--help`.
        choices: the allowed values; None: any value of the type.
        read: a function of the argument's name and value that returns the checked value or raises UserError, for an
            argument that is a switch (`--name`, `--no-name`) or has a value.
    """
    metadata = {"help": help, "choices": choices, "read": read}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def argument_fields(command: type) -> dict[str, Field[Any]]:
    """Return the arguments of a command by name; `command` is a dataclass."""
    return {f.name: f for f in fields(command) if "help" in f.metadata}


def value_type(f: Field[Any]) -> type:
    """Return the type of an argument's value: `int` for `int | None`, `list` for `list[int]`."""
    return typing.get_origin(_without_none(f.type)) or _without_none(f.type)


def item_type(f: Field[Any]) -> type:
    """Return the type of the items of a list argument: `int` for `list[int]`."""
    return typing.get_args(_without_none(f.type))[0]


def _without_none(kind: Any) -> Any:
    if isinstance(kind, UnionType):
        return next(option for option in typing.get_args(kind) if option is not type(None))
    return kind
