"""Diffusion components of CogVideoX, built by name from YAML.

See `sgm.util.instantiate_from_config`.
"""

from typing import Any

_NAMES = {
    "AutoencodingEngine": "sgm.models",
    "get_configs_path": "sgm.util",
    "instantiate_from_config": "sgm.util",
}


def __getattr__(name: str) -> Any:
    """Return one of the names above from its module, imported on first use.

    Some of these modules need seconds to load.
    """
    if name in _NAMES:
        import importlib

        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
