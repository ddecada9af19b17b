"""Build modules without memory."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cogvideox_sat.configuration.targets import iterate_targets
from sgm.errors import UserError
from sgm.util import get_obj_from_str, instantiate_from_config


def instantiate_on_meta(config: Mapping[str, Any], **extra: Any) -> nn.Module:
    """`instantiate_from_config`, but the module's tensors are on the meta device: shapes and dtypes without memory.

    Tables that are made with NumPy, or step by step from `torch.arange`, stay real.
    """
    # What modules allocate when they are imported must be real.
    import_compiler()
    for _, target in iterate_targets(config):
        get_obj_from_str(target)
    with _AllocateOnMeta():
        return instantiate_from_config(config, **extra)


def import_compiler() -> None:
    """Import the part of PyTorch that compiles, which einops does when it is first used.

    Raises:
        UserError: the folder where it keeps what it compiles cannot be made.
    """
    try:
        import torch._dynamo  # noqa: F401
    except OSError as error:
        raise UserError(
            f"TORCHINDUCTOR_CACHE_DIR: PyTorch cannot make the folder for what it compiles ({error}); name another one "
            "in this environment variable"
        ) from error


class _AllocateOnMeta(TorchFunctionMode):
    """Unlike `torch.device("meta")` as a context, it overrules a `device` that the caller names, as
    SwissArmyTransformer's layers do."""

    FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.FACTORIES:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
