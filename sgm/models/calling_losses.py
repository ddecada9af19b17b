"""Call the loss that a configuration names, from this project or another."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sgm.errors import UserError

NAMES = frozenset(
    (
        *("regularization_log", "optimizer_idx", "global_step", "last_layer", "split", "weights"),
        *("group", "frames", "z", "autoencoder"),
    )
)
"""Names of the values that an engine can pass to a loss, see `call_loss`."""


def loss_keywords(loss: Callable[..., Any]) -> set[str]:
    """Return the names of a loss's arguments besides inputs and reconstructions.

    The names are the loss's `forward_keys`, or else its keyword-only parameters, so that a plain loss such as
    `torch.nn.MSELoss` is called as `loss(inputs, reconstructions)`.
    """
    keys = getattr(loss, "forward_keys", None)
    if keys is not None:
        return set(keys)
    try:
        parameters = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature
        return set()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def check_loss(loss: Callable[..., Any]) -> None:
    """Check that a loss can be called with inputs, reconstructions and its further names.

    Raises:
        UserError: the loss takes other arguments.
    """
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except (TypeError, ValueError):  # a callable without a signature
        return
    try:
        signature.bind(None, None, **dict.fromkeys(NAMES & loss_keywords(loss)))
    except TypeError as error:
        raise UserError(
            f"loss_config: {type(loss).__name__} cannot be called as loss(inputs, reconstructions, ...): {error}; list "
            "its other arguments in its forward_keys, or use torch.nn.L1Loss"
        ) from error


def call_loss(
    loss: Callable[..., Any], inputs: Tensor, reconstructions: Tensor, given: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Return the loss of reconstructions, and its detached parts by name.

    A loss returns a scalar, or a pair of a scalar and a dictionary of numbers to log. A scalar alone is logged as
    `{split}/loss/rec`, that of a discriminator as `{split}/loss/disc`.

    Args:
        given: the values that a loss can ask for by name, see `loss_keywords`: `regularization_log`, `optimizer_idx` (0
            for the autoencoder, 1 for the discriminator), `global_step`, `last_layer`, `split`, `weights` (a factor of
            the reconstruction's part, or None), `z`, `autoencoder` (the engine), and for clips that several processes
            share `group` and `frames`, see `GeneralLPIPSWithDiscriminator`.

    Raises:
        UserError: the loss asks for an unknown name, does not take the `weights` that are needed, or returns something
            else.
    """
    name = type(loss).__name__
    wanted = loss_keywords(loss)
    if unknown := sorted(wanted - given.keys()):
        if getattr(loss, "forward_keys", None) is not None:
            raise UserError(
                f"loss_config: {name}.forward_keys has the unknown name '{unknown[0]}'; use {', '.join(given)}"
            )
        wanted &= given.keys()
    if given["weights"] is not None and "weights" not in wanted:
        raise UserError(
            f"image_video_weights: {name} takes no `weights` to balance images and videos; set [1, 1], or list "
            "'weights' in its forward_keys"
        )
    result = loss(inputs, reconstructions, **{key: given[key] for key in wanted})
    value, log = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(value, Tensor) or value.ndim or not (log is None or isinstance(log, Mapping)):
        shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UserError(
            f"loss_config: {name} returned {shown}; expected a scalar tensor, or a pair of it and numbers to log"
        )
    if log is None:
        log = {f"{given['split']}/loss/{'disc' if given['optimizer_idx'] else 'rec'}": value}
    return value, {key: _number(name, key, each, value) for key, each in log.items()}


def _number(loss: str, key: str, value: Any, like: Tensor) -> Tensor:
    """Return a number to log as a tensor without a gradient."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().reshape(())
    if isinstance(value, int | float):
        return torch.tensor(float(value), device=like.device)
    shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise UserError(f"loss_config: {loss} logs {shown} as '{key}'; expected a number")
