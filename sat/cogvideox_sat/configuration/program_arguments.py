"""Read arguments from an object of a program, such as the original's `Namespace`.

Nothing here imports PyTorch.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from cogvideox_sat.configuration.argument_fields import argument_fields
from cogvideox_sat.configuration.argument_lists import (
    IGNORED_KEYS,
    SamplingArguments,
    TrainingArguments,
    VaeTrainingArguments,
)
from cogvideox_sat.configuration.argument_reading import with_located_inputs
from cogvideox_sat.configuration.argument_values import check_value
from cogvideox_sat.configuration.files import with_located_paths
from cogvideox_sat.configuration.model_section import plain, plain_model_section
from sgm.errors import UserError

MISSPELT = 0.85  # difflib's ratio; SwissArmyTransformer's argument most similar to one of ours has 0.84


def arguments_from(command: type, given: Any, model_cls: type | None = None) -> Any:
    """Return the arguments of a command from those attributes of an object that are arguments.

    Args:
        given: an object of `command`, one with such attributes, such as `argparse.Namespace`, or a mapping.
        model_cls: an engine class of the program's own.

    Raises:
        UserError: `model_config` is not a section of a configuration, or a name is a misspelt argument.
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
    """Check that no given name is one of `names` misspelt.

    Names that are not similar are accepted, since they may mean something to the program.

    Args:
        given: the names in the program's object.

    Raises:
        UserError: a name is similar to one of `names` that is not given.
    """
    given, names = set(map(str, given)), set(names)
    for name in sorted(given - names - known_arguments()):
        if near := difflib.get_close_matches(name, sorted(names - given), 1, MISSPELT):
            raise UserError(f"{name}: unknown argument; did you mean {near[0]}?")


@cache
def known_arguments() -> frozenset[str]:
    """Return the names of all commands' arguments, and of some of the original's."""
    commands = (SamplingArguments, TrainingArguments, VaeTrainingArguments)
    return frozenset(f.name for command in commands for f in fields(command)) | {*IGNORED_KEYS}
