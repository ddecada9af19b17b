"""Building objects from configuration."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from sgm.errors import UserError


def get_obj_from_str(target: str) -> Any:
    """The object at an import path such as `sgm.modules.GeneralConditioner`.

    Raises:
        UserError: the module or the attribute does not exist. An ImportError raised *inside* an existing module
            passes through, since the target is then right and something it needs is missing.
    """
    module_name, _, attribute = target.rpartition(".")
    if not module_name:
        raise UserError(f"target '{target}' is not an import path of the form package.module.Class")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise UserError(f"target '{target}': there is no module '{error.name}'") from error
        raise
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise UserError(f"target '{target}': module '{module_name}' has no '{attribute}'") from error


def instantiate_from_config(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build `config["target"](**config["params"], **extra)`; `extra` wins over `params`.

    Raises:
        UserError: `target` is missing or does not import, or the class does not take these parameters.
    """
    if "target" not in config:
        raise UserError(f"expected a mapping with the key 'target', got the keys {sorted(config)}")
    factory = get_obj_from_str(config["target"])
    params = {**(config.get("params") or {}), **extra}
    try:
        inspect.signature(factory).bind(**params)
    except TypeError as error:
        raise UserError(f"{config['target']}: {error}; see its params in the configuration") from error
    except ValueError:  # a built-in that does not tell its signature
        pass
    return factory(**params)


_HELPERS = ("sgm.helpers", "sgm.context_parallel")


def __getattr__(name: str) -> Any:
    """Return a helper of `sgm.helpers` or `sgm.context_parallel`: imported when asked for, since they need PyTorch."""
    if not name.startswith("_"):
        for module in map(importlib.import_module, _HELPERS):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
