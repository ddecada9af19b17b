"""Whole models: autoencoders.

autoencoder                  the classes that configurations name
abstract_autoencoder         their base: batches, initial weights and the average of the weights
autoencoder_optimizers       which weights are trained, and by which optimizers
autoencoding_engine          training steps and validation; video_autoencoding_engine has those on clips
video_coder                  encoding and decoding of video; video_coder_memory estimates its memory
calling_losses               what a loss from any project is called with
"""

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
