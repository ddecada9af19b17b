"""Divide parameters into groups by regular expressions on their names."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sgm.errors import UserError


def match_groups(
    parameters: Mapping[str, nn.Parameter], patterns: Sequence[Sequence[str]], *, what: str
) -> list[dict[str, nn.Parameter]]:
    """Return the parameters of each group: those whose names begin with a match of a pattern.

    Args:
        what: the setting, for error messages.

    Raises:
        UserError: a pattern is not a regular expression or matches nothing, or a parameter is in two groups.
    """
    if isinstance(patterns, str) or any(isinstance(group, str) for group in patterns):
        raise UserError(f"{what}: expected a list of groups, each a list of patterns, got {patterns!r}")
    groups: list[dict[str, nn.Parameter]] = []
    home: dict[str, int] = {}
    for index, group in enumerate(patterns):
        members: dict[str, nn.Parameter] = {}
        for pattern in group:
            try:
                matching = {name: value for name, value in parameters.items() if re.match(pattern, name)}
            except re.error as error:
                raise UserError(f"{what}: '{pattern}' is not a regular expression: {error}") from error
            if not matching:
                raise UserError(f"{what}: '{pattern}' matches no parameter; {_nearest(pattern, parameters)}")
            members |= matching
        for name in members:
            if home.setdefault(name, index) != index:
                raise UserError(f"{what}: {name} is in the groups {home[name]} and {index}; put it into one only")
        groups.append(members)
    return groups


def pair_arguments(
    groups: Sequence[Mapping[str, nn.Parameter]], arguments: Sequence[Mapping[str, Any]] | None, *, what: str
) -> list[tuple[list[str], Mapping[str, Any]]]:
    """Return the names in each group, with the group's own arguments for an optimizer.

    Raises:
        UserError: the numbers of arguments and of groups differ.
    """
    if arguments is None:
        arguments = [{}] * len(groups)
    if len(arguments) != len(groups):
        raise UserError(f"{what}: {len(arguments)} sets of arguments for {len(groups)} groups; expected one each")
    return [(list(group), own) for group, own in zip(groups, arguments, strict=True)]


def _nearest(pattern: str, names: Mapping[str, Any]) -> str:
    if not names:
        return "the model has none to train"
    literal = pattern.replace("\\", "").replace(".*", "").strip("^$")
    near = difflib.get_close_matches(literal, names, n=3, cutoff=0.0)
    return f"the nearest names are {', '.join(near)}"
