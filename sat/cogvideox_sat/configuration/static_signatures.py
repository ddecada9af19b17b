"""Read parameters of this project's classes off their source, before PyTorch is imported.

All classes are checked again when they are built: see `sgm.config_values`.
"""

import ast
import collections.abc
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from cogvideox_sat.configuration.targets import find_source
from sgm.config_places import Key, walk
from sgm.config_values import Parameters, Problem, check_params, is_own_file

# Names in annotations of parameters that YAML can hold. Parameters with other names accept any value.
NAMES = {
    **{name: getattr(collections.abc, name) for name in ("Mapping", "Sequence", "Iterable", "Collection")},
    **{kind.__name__: kind for kind in (int, float, bool, str, list, dict, tuple)},
    **{"Any": Any, "Path": Path, "Literal": typing.Literal, "Config": Mapping[str, Any]},
}


def problem_of_section(section: Mapping[str, Any], name: str) -> tuple[Key, str] | None:
    """Return the first key of a section that its class, one of ours, refuses, and the problem.

    The result is None if there is no problem.

    Args:
        name: the section's name, the first part of the key.
    """
    for key, node in walk(section, (name,)):
        if isinstance(node, Mapping) and isinstance(node.get("target"), str):
            params = node.get("params")
            if isinstance(params, Mapping) and (problem := problem_of_target(node["target"], params)):
                return (*key, "params", *problem.key), problem.text
    return None


def problem_of_target(target: str, params: Mapping[str, Any]) -> Problem | None:
    """Return the problem with the parameters of a class of ours; None for other classes."""
    taken = static_parameters(target)
    return check_params(taken, params) if taken else None


@cache
def static_parameters(target: str) -> Parameters | None:
    """Return the parameters of a class of this project; None if its source does not show them.

    No parameter is `required`, since the program passes some parameters itself.
    """
    hints: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    seen: set[str] = set()
    while target not in seen:
        seen.add(target)
        found = _find_class(target)
        if found is None:
            break
        module, tree, definition = found
        init = next((n for n in definition.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is not None:
            _add_parameters(init, hints, defaults)
            if init.args.kwarg is None:
                return Parameters(hints, defaults, (), closed=True)
        base = next((base.id for base in definition.bases if isinstance(base, ast.Name)), None)
        if base is None:
            break
        target = _where(module, tree, base)
    return Parameters(hints, defaults, (), closed=False) if hints else None


def _add_parameters(init: ast.FunctionDef, hints: dict[str, Any], defaults: dict[str, Any]) -> None:
    positional = init.args.args[1:]
    given = [None] * (len(positional) - len(init.args.defaults)) + list(init.args.defaults[-len(positional) :])
    pairs = [*zip(positional, given, strict=False), *zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)]
    for argument, default in pairs:
        if argument.arg in hints:
            continue
        hints[argument.arg] = _annotation(argument.annotation)
        try:
            if default is not None:
                defaults[argument.arg] = ast.literal_eval(default)
        except ValueError:  # the default is an expression, such as math.inf
            hints[argument.arg] = Any


def _annotation(node: ast.expr | None) -> Any:
    """Return the type that an annotation stands for; Any if it uses other names than `NAMES`."""
    if node is None or any(isinstance(part, ast.Name) and part.id not in NAMES for part in ast.walk(node)):
        return Any
    allowed = (ast.Name, ast.Load, ast.Subscript, ast.Tuple, ast.BinOp, ast.BitOr, ast.Constant)
    if not all(isinstance(part, allowed) for part in ast.walk(node)):
        return Any
    # This is safe, because the source is our own.
    return eval(compile(ast.Expression(node), "annotation", "eval"), {"__builtins__": {}}, NAMES)


def _find_class(target: str) -> tuple[str, ast.Module, ast.ClassDef] | None:
    """Return the module, its source and the definition of one of our classes, else None."""
    for _ in range(10):  # follow modules that only import the class
        module, _, name = target.rpartition(".")
        source = find_source(module)
        if source is None or not is_own_file(str(source)):
            return None
        tree = _parsed(source)
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, tree, node
        further = _where(module, tree, name)
        if further == target:
            return None
        target = further
    return None


def _where(module: str, tree: ast.Module, name: str) -> str:
    """Return the import path of the object that a module calls `name`."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return f"{node.module}.{alias.name}"
    return f"{module}.{name}"


@cache
def _parsed(source: Path) -> ast.Module:
    return ast.parse(source.read_bytes())
