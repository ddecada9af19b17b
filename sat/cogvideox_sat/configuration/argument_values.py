"""Check names of arguments and the types of their values.

Values come from the `args:` section of a configuration file, or from a program.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import Field
from pathlib import Path
from typing import Any

from cogvideox_sat.configuration.argument_fields import argument_fields, item_type, value_type
from cogvideox_sat.configuration.similar_names import nearest
from sgm.errors import UserError

TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
ITEM_NAMES = {int: "whole numbers", float: "numbers", str: "texts"}
FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def given_values(command: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked values of arguments that a program gives by name.

    None stands for the default of an argument, and is left out.

    Raises:
        UserError: a name is not an argument, or a value is of the wrong type or not one of the choices.
    """
    known, given = argument_fields(command), {}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{name}: unknown argument{nearest(name, sorted(known), otherwise='')}")
        if isinstance(value, Path):
            value = str(value)
        if isinstance(value, tuple):
            value = list(value)
        if value is not None:
            with without_section():
                given[name] = check_value(known[name], value)
    return given


@contextmanager
def without_section() -> Iterator[None]:
    """Remove `args: ` from the beginning of the block's UserErrors.

    It is for values that are from no file.
    """
    try:
        yield
    except UserError as error:
        raise UserError(str(error).removeprefix("args: ")) from error


def check_section(command: type, section: Mapping[str, Any], foreign: Collection[str] = ()) -> dict[str, Any]:
    """Return the `args:` section with its keys and the types of its values checked.

    Keys in `foreign`, which are arguments of another command, are left out.

    Raises:
        UserError: a key is unknown, or a value is of the wrong type or not one of the choices.
    """
    known, values = argument_fields(command), {}
    for name, value in section.items():
        if name not in known:
            if name in foreign:
                continue
            raise UserError(f"args: unknown key '{name}'{nearest(str(name), sorted({*known, *map(str, foreign)}))}")
        if value is not None:  # an empty key means the same as none
            values[name] = check_value(known[name], value)
    return values


def check_value(f: Field[Any], value: Any) -> Any:
    """Return a value of a configuration file as the type of its argument.

    A float may be written `3` or `1e-3`, an int `[1]`.

    Raises:
        UserError: the value is of another type, or not one of the choices.
    """
    if read := f.metadata["read"]:
        return read(f"args: {f.name}", value)
    kind = value_type(f)
    if kind is float and (type(value) is int or (isinstance(value, str) and FLOAT.fullmatch(value))):
        value = float(value)  # YAML takes 1e-3, which has no point, for text
    if kind is int and isinstance(value, list) and len(value) == 1:
        value = value[0]  # `batch_size: [1]`, as older files have it
    if kind is list and item_type(f) is str and isinstance(value, str):
        value = [value]
    if kind is list and item_type(f) is float and isinstance(value, list):
        value = [float(item) if type(item) is int else item for item in value]
    items = value if isinstance(value, list) else []
    fits = type(value) is kind and all(type(item) is item_type(f) for item in items)
    if not fits:
        expected = ITEM_NAMES[item_type(f)] if kind is list else TYPE_NAMES[kind]
        raise UserError(f"args: {f.name}: got {value!r}; expected {expected}")
    choices = f.metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"args: {f.name}: got '{value}'; it can be {', '.join(choices)}")
    return value
