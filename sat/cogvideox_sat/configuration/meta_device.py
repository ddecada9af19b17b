"""Build modules on the meta device, which takes no memory."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cogvideox_sat.configuration.targets import iterate_targets
from sgm.errors import UserError
from sgm.util import get_obj_from_str, instantiate_from_config


def instantiate_on_meta(config: Mapping[str, Any], **extra: Any) -> nn.Module:
    """Return the module that `instantiate_from_config` builds, but on the meta device.

    The tensors have shapes and dtypes but no memory. Tables that are made with NumPy, or step by step from
    `torch.arange`, stay real.
    """
    # Tensors that Python modules allocate when they are imported must be real.
    import_compiler()
    for _, target in iterate_targets(config):
        get_obj_from_str(target)
    with _AllocateOnMeta():
        return instantiate_from_config(config, **extra)


def import_compiler() -> None:
    """Import PyTorch's compiler, which einops imports when it is first used.

    Raises:
        UserError: the folder for compiled code cannot be made.
    """
    try:
        import torch._dynamo  # noqa: F401
    except OSError as error:
        raise UserError(
            f"TORCHINDUCTOR_CACHE_DIR: PyTorch cannot make its folder for compiled code ({error}); name another folder "
            "in this environment variable"
        ) from error


class _AllocateOnMeta(TorchFunctionMode):
    """Context in which factory functions of PyTorch allocate on the meta device.

    Unlike `torch.device("meta")`, it overrides a `device` that the caller names, as SwissArmyTransformer's layers do.
    """

    FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.FACTORIES:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
