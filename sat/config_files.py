"""Reading configuration files: YAML with `include`, merged in order, with every mistake named by file and key.

Nothing here imports PyTorch, so that a mistake is reported at once.
"""

import ast
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sgm.errors import UserError

PATH_KEYS = ("load", "lora_load", "ckpt_path", "model_dir")
SECTIONS = ("args", "model", "deepspeed", "data", "lightning")


def load_configs(
    paths: Sequence[str | Path], used: Sequence[str] = SECTIONS, exclusive: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """The merged content of configuration files, later ones overriding earlier ones.

    A file may start from others: `include: other.yaml`, or a list, relative to itself.

    Args:
        used: the sections whose targets must import.
        exclusive: pairs of switches in `args`; a file that turns one on turns off the other, unless it sets both.

    Raises:
        UserError: a file is missing, unreadable, not YAML, or has an unknown section; interpolations do not resolve; a
            target does not import.
    """
    files = [file for path in paths for file in _with_includes(Path(path), ())]
    for _, content in files:
        replace_exclusive(content.get("args", {}), exclusive)
    try:
        merged = OmegaConf.merge(*(OmegaConf.create(content) for _, content in files))
        config = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list over a mapping
        names = ", ".join(str(path) for path in paths)
        raise UserError(f"{names}: cannot merge: {str(error).splitlines()[0]}") from error
    for key, target in iterate_targets({section: config.get(section) for section in used}):
        if problem := why_target_fails(target):
            where = next((path for path, content in reversed(files) if _get(content, key) == target), paths[-1])
            raise UserError(f"{where}: {key}: {target}: {problem}")
    return config


def replace_exclusive(args: dict[str, Any], pairs: Sequence[tuple[str, str]]) -> None:
    """Turn off the other of each pair of switches that `args` turns on, so that it overrides what came before."""
    for one, other in (*pairs, *(pair[::-1] for pair in pairs)):
        if args.get(one) is True and other not in args:
            args[other] = False


def _with_includes(path: Path, parents: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The files that `path` includes, innermost first, and `path` itself, each with its content."""
    if path.resolve() in parents:
        raise UserError(f"{path}: includes itself")
    content = _read_yaml(path)
    includes = content.pop("include", None) or []
    includes = includes if isinstance(includes, list) else [includes]
    if not all(isinstance(include, str) for include in includes):
        raise UserError(f"{path}: include is {includes!r}; expected the names of files")
    for include in includes:
        yield from _with_includes(path.parent / include, (*parents, path.resolve()))
    for section, value in content.items():
        if section not in SECTIONS:
            raise UserError(f"{path}: unknown section '{section}'; there are {', '.join(SECTIONS)} (and include)")
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{path}: the section '{section}' is {value!r}; expected keys and values")
    yield path, {section: value for section, value in content.items() if value is not None}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"configuration {path} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"configuration {path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"configuration {path}: expected sections ({', '.join(SECTIONS)}) at the top level")
    return content


def check_paths(config: dict[str, Any]) -> None:
    """Raises UserError if a file or folder that a configuration loads from is not there."""
    for key, path in _iterate_paths(config):
        if path and not Path(str(path)).exists():
            raise UserError(f"{key}: there is no {path}; the README says where to get it and where to put it")


def _iterate_paths(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    for name, child in _children(node):
        path = f"{key}{name}"
        if isinstance(child, dict | list):
            yield from _iterate_paths(child, f"{path}.")
        elif name in PATH_KEYS and not (isinstance(node, dict) and node.get("cache_dir")):  # else a name on a hub
            yield path, child


def _children(node: dict | list) -> Iterator[tuple[str, Any]]:
    return iter(node.items()) if isinstance(node, dict) else ((str(i), child) for i, child in enumerate(node))


def iterate_targets(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every `target:` below `node`, with its dotted key."""
    if isinstance(node, dict):
        for name, child in node.items():
            path = f"{key}.{name}" if key else str(name)
            if name == "target" and isinstance(child, str):
                yield path, child
            else:
                yield from iterate_targets(child, path)
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from iterate_targets(child, f"{key}[{index}]")


def _get(node: Any, key: str) -> Any:
    for part in key.replace("[", ".[").split("."):
        try:
            node = node[int(part[1:-1])] if part.startswith("[") else node[part]
        except (KeyError, IndexError, TypeError):
            return None
    return node


def why_target_fails(target: str) -> str | None:
    """Why the import path `target` will not resolve, found without importing anything; None if it should."""
    module_name, _, attribute = target.rpartition(".")
    if not module_name:
        return "not an import path of the form module.Class"
    parts, search_path, spec = module_name.split("."), None, None
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        spec = _find_spec(name, search_path)
        if spec is None:
            return f"there is no module '{name}'"
        search_path = spec.submodule_search_locations
    if not spec.origin or not spec.origin.endswith(".py"):
        return None
    names, open_ended = _defined_names(Path(spec.origin))
    if attribute in names or open_ended or _find_spec(target, search_path):
        return None
    return f"module '{module_name}' has no '{attribute}'"


def _find_spec(name: str, search_path: Any) -> importlib.machinery.ModuleSpec | None:
    if search_path is None and name in sys.builtin_module_names:
        return importlib.util.find_spec(name)
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find and (spec := find(name, search_path)) is not None:
            return spec
    return None


def _defined_names(source: Path) -> tuple[set[str], bool]:
    """Names that a module's top level defines, and whether more may appear that reading it does not show."""
    names: set[str] = set()
    tree = ast.parse(source.read_bytes())
    open_ended = False
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
            open_ended |= node.name == "__getattr__"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
            open_ended |= any(alias.name == "*" for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            open_ended |= node.func.id in ("globals", "locals", "setattr")
    return names, open_ended
