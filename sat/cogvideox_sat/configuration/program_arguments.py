"""Arguments that a program holds in an object of its own, such as the original's `Namespace`.

Nothing here imports PyTorch.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from cogvideox_sat.configuration.argument_lists import (
    IGNORED_KEYS,
    SamplingArguments,
    TrainingArguments,
    VaeTrainingArguments,
)
from cogvideox_sat.configuration.argument_schema import argument_fields, check_value, with_located_inputs
from cogvideox_sat.configuration.files import with_located_paths
from cogvideox_sat.configuration.model_section import plain, plain_model_section
from sgm.errors import UserError

MISSPELT = 0.85  # of difflib's ratio; SwissArmyTransformer's own argument nearest to one of ours has 0.84


def arguments_from(command: type, given: Any, model_cls: type | None = None) -> Any:
    """Return the arguments of a command from an object of a program: its attributes that are arguments.

    Args:
        given: an object of `command`, one with such attributes as `argparse.Namespace`, or a mapping.
        model_cls: an engine of the program's own.

    Raises:
        UserError: `model_config` is no section of a configuration, or a name is an argument misspelt.
    """
    given = plain(given, "arguments")
    given = given if isinstance(given, Mapping) else vars(given)
    check_spelling(given, {f.name for f in fields(command)})
    values = {f.name: given[f.name] for f in fields(command) if f.name in given}
    known = argument_fields(command)
    for name, value in values.items():
        values[name] = plain(value, name)
        if name in known and value is not None:
            values[name] = check_value(known[name], values[name])
    section = plain_model_section(values.get("model_config"))
    values["model_config"] = with_located_paths(section, "model")
    values["model_cls"] = model_cls or values.get("model_cls")
    return command(**with_located_inputs(values))


def check_spelling(given: Iterable[str], names: Iterable[str]) -> None:
    """Check that no name is one of the `names` misspelt; other names may mean something to the program.

    Args:
        given: what the program's object has.

    Raises:
        UserError: one is nearly one of the names, which is not given.
    """
    given, names = set(map(str, given)), set(names)
    for name in sorted(given - names - known_arguments()):
        if near := difflib.get_close_matches(name, sorted(names - given), 1, MISSPELT):
            raise UserError(f"{name}: the arguments have no such setting; did you mean {near[0]}?")


@cache
def known_arguments() -> frozenset[str]:
    """Return the names that objects of arguments have anyway: those of all commands, and some of the original's."""
    commands = (SamplingArguments, TrainingArguments, VaeTrainingArguments)
    return frozenset(f.name for command in commands for f in fields(command)) | {*IGNORED_KEYS}
