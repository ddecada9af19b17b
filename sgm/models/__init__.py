"""Whole models: autoencoders."""

from typing import Any

__all__ = ["AutoencodingEngine"]


def __getattr__(name: str) -> Any:
    """Return an engine of `sgm.models.autoencoder`, imported on first use.

    Lightning takes seconds to load.
    """
    if name in __all__:
        from sgm.models import autoencoder

        return getattr(autoencoder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
