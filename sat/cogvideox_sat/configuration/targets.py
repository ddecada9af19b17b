"""Check that an import path (`target:`) leads to a class, without importing anything.

The source files are read instead.
"""

import ast
import functools
import importlib.machinery
import importlib.util
import keyword
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sgm.module_aliases import MODULE_ALIASES

# Modules that files which came with something else, such as a checkpoint, may name: our own, and those of the libraries
# that define layers and optimizers.
TRUSTED_PACKAGES = ("sgm", "vae_modules", "sat", "torch.nn", "torch.optim")
OWN_MODULES = (
    *("data_video", "diffusion_video", "dit_video_concat"),
    # `dit_video_concat` passes on the classes of these.
    *(f"cogvideox_sat.network.{name}" for name in ("adaptive_layer", "patches", "position_embeddings")),
    *MODULE_ALIASES,
)
LONGEST_TARGET = 300


class _Names(NamedTuple):
    """Names that a module's source defines.

    Attributes:
        all: all names.
        functions, modules: names that can only be functions or modules.
        imported: for a name that is imported from a module: the level of the import, that module, and the name there.
        open_ended: the module may define more names than its source shows.
    """

    all: frozenset[str]
    functions: frozenset[str]
    modules: frozenset[str]
    imported: dict[str, tuple[int, str, str]]
    open_ended: bool


def is_trusted(module: str) -> bool:
    """Return whether files that came with something else may name definitions of `module`."""
    if any(module == package or module.startswith(f"{package}.") for package in TRUSTED_PACKAGES):
        return True
    return module in OWN_MODULES


def iterate_targets(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the value of every `target:` below `node`."""
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


def why_target_fails(target: str, trusted: bool = True) -> str | None:
    """Return the reason why an import path does not lead to a class; None if it may.

    Args:
        trusted: the file that names it is the user's own; other files may name only modules that `is_trusted`.
    """
    module_name, _, attribute = target.rpartition(".")
    module_name = MODULE_ALIASES.get(module_name, module_name)
    parts = module_name.split(".")
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in (*parts, attribute)):
        return "not an import path of the form module.Class"
    if len(target) > LONGEST_TARGET:
        return f"an import path of {len(target)} characters; expected module.Class"
    if not trusted and not is_trusted(module_name):
        return f"files that came with something else may name only classes of {', '.join(TRUSTED_PACKAGES)} and our own"
    search_path, spec = None, None
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        spec = _find_spec(name, search_path) if depth == 1 or search_path is not None else None
        if spec is None:
            return f"module '{name}' does not exist"
        search_path = spec.submodule_search_locations
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    try:
        names = _defined_names(Path(spec.origin))
    except (SyntaxError, ValueError) as error:
        return f"{spec.origin} is not valid Python: {error}"
    if attribute in names.functions:
        return f"'{attribute}' is a function; name a class"
    if not trusted and (problem := _why_reexport_fails(module_name, attribute, spec, names)):
        return problem
    if attribute in names.all or names.open_ended or (search_path and _find_spec(target, search_path)):
        return None
    return f"module '{module_name}' has no '{attribute}'"


def _why_reexport_fails(module: str, attribute: str, spec: importlib.machinery.ModuleSpec, names: _Names) -> str | None:
    """Return the reason why `attribute` is not a class of a trusted module; None if it is.

    A trusted module may import objects of other modules.
    """
    if attribute in names.modules:
        return f"'{attribute}' is a module; name a class"
    if (origin := names.imported.get(attribute)) is None:
        return None
    level, source, name = origin
    if level:
        package = module if spec.submodule_search_locations else module.rpartition(".")[0]
        for _ in range(level - 1):
            package = package.rpartition(".")[0]
        source = f"{package}.{source}".strip(".")
    return why_target_fails(f"{source}.{name}", trusted=False)


def find_source(module: str) -> Path | None:
    """Return the source file of a module, found without importing it; None if it has none."""
    search_path, spec = None, None
    parts = MODULE_ALIASES.get(module, module).split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    for depth in range(1, len(parts) + 1):
        if depth > 1 and search_path is None:
            return None
        spec = _find_spec(".".join(parts[:depth]), search_path)
        if spec is None:
            return None
        search_path = spec.submodule_search_locations
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _find_spec(name: str, search_path: Any) -> importlib.machinery.ModuleSpec | None:
    if search_path is None and name in sys.builtin_module_names:
        return importlib.util.find_spec(name)
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find and (spec := find(name, search_path)) is not None:
            return spec
    return None


@functools.cache
def _defined_names(source: Path) -> _Names:
    """Return all names that a module defines, and those that can only be functions or modules."""
    names: set[str] = set()
    stored: set[str] = set()  # by an assignment or a class, in any scope
    imported: dict[str, tuple[int, str, str]] = {}
    tree = ast.parse(source.read_bytes())
    open_ended = False
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
            open_ended |= node.name == "__getattr__"
            if isinstance(node, ast.ClassDef):
                stored.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
            open_ended |= any(alias.name == "*" for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                origins = {
                    alias.asname or alias.name: (node.level, node.module or "", alias.name) for alias in node.names
                }
                imported |= origins
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            stored.add(node.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            open_ended |= node.func.id in ("globals", "locals", "setattr")
    names |= stored
    functions: set[str] = set()
    modules: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.decorator_list:
            functions.add(node.name)
        elif isinstance(node, ast.Import):
            modules.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
    return _Names(frozenset(names), frozenset(functions - stored), frozenset(modules - stored), imported, open_ended)
