"""Build objects from a configuration."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from sgm.config_blame import blame
from sgm.config_places import ConfigError, Place, current_place, dotted, within
from sgm.config_slots import why_not
from sgm.config_values import is_own_file, problem_of_params
from sgm.errors import UserError, shown
from sgm.module_aliases import MODULE_ALIASES


def get_obj_from_str(target: str) -> Any:
    """Return the object at an import path such as `sgm.modules.GeneralConditioner`.

    Raises:
        UserError: the module or the attribute does not exist, or a module of another project fails during import. An
            ImportError *inside* a module of this project is not caught: the target is right, and a requirement is
            missing.
    """
    module_name, _, attribute = target.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in target.split(".")):
        raise UserError(f"target {shown(target)} is not an import path; write it as package.module.Class")
    module_name = MODULE_ALIASES.get(module_name, module_name)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise UserError(f"target '{target}': module '{error.name}' does not exist") from error
        _raise_of_import(error, target, module_name)
    except Exception as error:  # a user's module may raise anything during import
        _raise_of_import(error, target, module_name)
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise UserError(f"target '{target}': module '{module_name}' has no '{attribute}'") from error


def _raise_of_import(error: Exception, target: str, module_name: str) -> NoReturn:
    spec = importlib.util.find_spec(module_name.partition(".")[0])
    if spec is None or spec.origin is None or is_own_file(spec.origin):
        raise error
    raise UserError(f"target '{target}': importing it fails with {type(error).__name__}: {error}") from error


def instantiate_from_config(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build `config["target"](**config["params"], **extra)`; `extra` overrides `params`.

    Before the call, the class must be one that the key of the configuration takes (`config_slots`), and `params` must
    be complete, with known names and declared types.

    Raises:
        UserError: `target` or `params` are wrong, or the constructor refuses them. The message begins with the file and
            the key, if they are known: within `config_places.section`.
    """
    parent = current_place()
    place = _place_of(config, parent)
    factory = class_of_config(config, place)
    params = config.get("params")
    if params is not None and not isinstance(params, Mapping):
        raise error_at(place.below("params"), f"got {shown(params)}; expected keys and values")
    params = dict(params or {})
    if problem := problem_of_params(factory, params, extra):
        if not place.known:
            raise UserError(f"{config['target']}: {dotted(('params', *problem.key))}: {problem.text}")
        raise error_at(place.below("params", *problem.key), problem.text)
    with reporting(place, parent):
        return factory(**{**params, **extra})


@contextmanager
def reporting(place: Place, parent: Place | None, use: Callable[[Any], Any] | None = None) -> Iterator[None]:
    """Report an exception of the block, which builds an object at `place`, with file and key.

    Full memory, and mistakes in this program rather than in the values (see `config_blame`), pass through.

    Args:
        parent: the outer place; None: no file is known, and everything passes through.
        use: what the block does with an object that is already built.
    """
    try:
        with within(place):
            yield
    except UserError as error:
        if parent is None or type(error) is not UserError or place.slot == "data":
            raise  # most errors of data are about clips and captions, not about this section
        raise error_at(place, str(error)) from error
    except Exception as error:
        if parent is None or not (problem := blame(error, place, parent, use)):
            raise
        raise ConfigError(problem) from error


def class_of_config(config: Any, place: Place | None = None) -> type:
    """Return the class that a configuration names as its `target`, without calling it.

    Args:
        place: the place of the configuration; None: it is searched in the object being built.

    Raises:
        UserError: the class does not exist, or does not suit this key.
    """
    place = place or _place_of(config, current_place())
    if not isinstance(config, Mapping):
        raise error_at(place, f"got {shown(config)}; expected a mapping with the keys target and params")
    if "target" not in config:
        raise error_at(place, f"expected a mapping with the key 'target', got the keys {sorted(map(str, config))}")
    return class_at(config["target"], place.below("target"), place.slot)


def class_at(target: Any, place: Place, slot: str | None) -> type:
    """Return the class at an import path, which the key `slot` must take (`config_slots`).

    Raises:
        UserError: the target is not such a class.
    """
    if not isinstance(target, str):
        raise error_at(place, f"got {shown(target)}; expected an import path of the form package.module.Class")
    try:
        kind = get_obj_from_str(target)
    except UserError as error:
        raise error_at(place, str(error)) from error
    if problem := why_not(kind, slot):
        raise error_at(place, f"{target} {problem}")
    return kind


def error_at(place: Place, problem: str) -> UserError:
    """Return an error about a place in a configuration."""
    return ConfigError(f"{place}: {problem}") if place.known else UserError(problem)


def _place_of(config: Any, parent: Place | None) -> Place:
    if parent is None:
        return Place((), config, building=True)
    key = parent.find(config)
    return Place((*parent.key, *(key or ())), config, parent.sources, building=True, found=key is not None)


_HELPERS = ("sgm.helpers", "sgm.context_parallel")


def __getattr__(name: str) -> Any:
    """Return a helper of `sgm.helpers` or `sgm.context_parallel`, imported on first use.

    Both modules need PyTorch.
    """
    if not name.startswith("_"):
        for module in map(importlib.import_module, _HELPERS):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
