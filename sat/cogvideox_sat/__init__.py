"""Training and sampling of the CogVideoX video models. CONTRIBUTING.md has the map of the packages."""

from typing import Any

_NAMES = {"__version__": "cogvideox_sat.version"}


def __getattr__(name: str) -> Any:
    """Return one of the names above from its module, which is imported when it is asked for."""
    if name in _NAMES:
        import importlib

        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
