"""Choose whether a network is compiled with torch.compile."""

import logging

import torch
from torch import nn

from sgm.compilation import why_not_compilable

logger = logging.getLogger(__name__)

AUTO = "auto"  # value of `compile_model`


def choose_compilation(asked: bool | str | None, network: nn.Module, device: torch.device) -> bool:
    """Return whether the network is compiled, as `compile_model` says.

    With `auto`, it is compiled where that is faster: on a GPU, if the network's layers can be compiled; these are then
    prepared for it. If no compiler is available, the network is not compiled, and a warning is logged.

    Args:
        asked: value of `compile_model`; None: `auto`.
        device: device on which the network computes.
    """
    asked = AUTO if asked is None else asked
    pays = device.type == "cuda" and hasattr(network, "compile_layers")
    if not (pays if asked == AUTO else asked):
        return False
    if reason := why_not_compilable(device):
        logger.warning("compile_model: the network runs without torch.compile, which fails here: %s", reason)
        return False
    return bool(asked != AUTO or network.compile_layers())
