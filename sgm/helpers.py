"""Small functions under the original's names, which `sgm.util` exports too."""

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgm.errors import UserError
from sgm.modules.diffusionmodules.util import append_dims, mean_flat
from sgm.util import class_of_config, instantiate_from_config

__all__ = [
    "append_dims",
    "append_zero",
    "autocast",
    "count_params",
    "default",
    "disabled_train",
    "exists",
    "expand_dims_like",
    "get_configs_path",
    "get_nested_attribute",
    "get_string_from_tuple",
    "is_power_of_two",
    "isheatmap",
    "isimage",
    "ismap",
    "isneighbors",
    "load_model_from_config",
    "load_partial_from_config",
    "log_txt_as_img",
    "make_path_absolute",
    "mean_flat",
    "partialclass",
    "uniq",
]

log = logging.getLogger(__name__)


# ---------------------------------------------------------------- values


def exists(value: Any) -> bool:
    """Return True for any value except None."""
    return value is not None


def default(value: Any, fallback: Any) -> Any:
    """Return `value`, or `fallback` if it is None; a fallback function is called."""
    if value is not None:
        return value
    is_function = callable(fallback) and not isinstance(fallback, type | nn.Module)
    return fallback() if is_function else fallback


def uniq(values: Iterable[Any]) -> Iterable[Any]:
    """Return the different values, in the order of their first appearance."""
    return dict.fromkeys(values).keys()


def is_power_of_two(n: int) -> bool:
    """Return True for 1, 2, 4, 8, and so on."""
    return n > 0 and n & (n - 1) == 0


def get_string_from_tuple(text: str) -> str:
    """Return the first entry of a written tuple such as `"('a', 'b')"`, or any other text."""
    if text.startswith("(") and text.endswith(")"):
        return text[1:-1].split(",")[0].strip().strip("'\"")
    return text


def get_nested_attribute(
    obj: Any, attribute_path: str, depth: int | None = None, return_key: bool = False
) -> Any | tuple[Any, str | int]:
    """Return the object at a path of attributes: `"a.0.b"` means `obj.a[0].b`.

    Args:
        depth: number of parts of the path to follow; None: the whole path.
        return_key: also return the last part that was followed, an integer if it is an index.

    Raises:
        AttributeError, LookupError: a part does not exist.
    """
    key: str | int = ""
    for part in attribute_path.split(".")[: depth or None]:
        key = int(part) if part.isdecimal() else part
        obj = obj[key] if isinstance(key, int) else getattr(obj, key)
    return (obj, key) if return_key else obj


# ---------------------------------------------------------------- tensors


def _is_image_batch(x: Any, channels: Callable[[int], bool]) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4 and channels(x.shape[1])


def ismap(x: Any) -> bool:
    """Return True for (batch, channels, height, width) of more than three channels."""
    return _is_image_batch(x, lambda channels: channels > 3)


def isimage(x: Any) -> bool:
    """Return True for (batch, channels, height, width) of one or three channels."""
    return _is_image_batch(x, lambda channels: channels in (1, 3))


def isheatmap(x: Any) -> bool:
    """Return True for a tensor (height, width)."""
    return isinstance(x, Tensor) and x.ndim == 2


def isneighbors(x: Any) -> bool:
    """Return True for (batch, neighbours, channels, height, width) of one or three channels."""
    return isinstance(x, Tensor) and x.ndim == 5 and x.shape[2] in (1, 3)


def expand_dims_like(x: Tensor, y: Tensor) -> Tensor:
    """Return `x` with trailing axes of length 1, up to the number of axes of `y`."""
    return append_dims(x, y.ndim)


def append_zero(x: Tensor) -> Tensor:
    """Return `x` (n,) followed by a zero."""
    return torch.cat([x, x.new_zeros(1)])


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[str], size: int = 10) -> Tensor:
    """Return pictures of texts, black on white: float32 (batch, 3, height, width) in [-1, 1].

    Args:
        wh: width and height in pixels.
        xc: the texts; lines are broken to fit the width.
        size: of the letters, in pixels.
    """
    import textwrap

    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size)
    width = max(1, int(wh[0] / max(1.0, font.getlength("x"))))
    pictures = []
    for text in xc:
        picture = Image.new("RGB", (wh[0], wh[1]), "white")
        lines = [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, width) or [""]]
        ImageDraw.Draw(picture).multiline_text((0, 0), "\n".join(lines), fill="black", font=font)
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(pictures)


# ---------------------------------------------------------------- modules


def disabled_train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Return the module unchanged; as a replacement of `train` it keeps the module's mode."""
    return self


def count_params(model: nn.Module, verbose: bool = False) -> int:
    """Return the number of a module's parameters; with `verbose`, log it in millions."""
    count = sum(parameter.numel() for parameter in model.parameters())
    if verbose:
        log.info("%s has %.2f million parameters", type(model).__name__, count / 1e6)
    return count


def autocast(f: Callable[..., Any], enabled: bool = True) -> Callable[..., Any]:
    """Return `f` under CUDA's autocast, or with `enabled: False` without autocast."""

    @functools.wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cuda", enabled=enabled and torch.cuda.is_available()):
            return f(*args, **kwargs)

    return wrapper


# ---------------------------------------------------------------- configurations and paths


def partialclass(cls: type[Any], *args: Any, **kwargs: Any) -> type:
    """Return a subclass of `cls` whose constructor has these arguments filled in."""

    class Partial(cls):
        __init__ = functools.partialmethod(cls.__init__, *args, **kwargs)

    Partial.__name__, Partial.__qualname__, Partial.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Partial


def load_partial_from_config(config: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the class that a configuration names, with its `params` filled in.

    Raises:
        UserError: the class does not exist.
    """
    return functools.partial(class_of_config(config), **(config.get("params") or {}))


def load_model_from_config(
    config: Mapping[str, Any], ckpt: str | Path, verbose: bool = True, freeze: bool = True
) -> nn.Module:
    """Return the model under `config["model"]` in evaluation mode, with the weights of a file.

    Entries that only the file or only the model has are skipped, and logged with `verbose`.

    Args:
        ckpt: see `sgm.weights.read_state_dict`.
        freeze: set `requires_grad` of the parameters to False.

    Raises:
        UserError: the file cannot be read, no entry of it fits, or a shape differs.
    """
    from sgm.weights import assign_weights, module_weights, read_state_dict

    weights = module_weights(read_state_dict(ckpt), what=str(ckpt))
    model = instantiate_from_config(config["model"])
    missing, unexpected = assign_weights(model, weights, what=str(ckpt), allow_missing=True, allow_unexpected=True)
    if len(unexpected) == len(weights):
        raise UserError(f"ckpt: no entry of {ckpt} fits {type(model).__name__}; give weights of this model")
    if verbose and missing:
        log.warning("%s: entries that do not exist in the file: %s", ckpt, ", ".join(missing))
    if verbose and unexpected:
        log.warning("%s: entries that do not exist in the model: %s", ckpt, ", ".join(unexpected))
    if freeze:
        model.requires_grad_(False)
    return model.eval()


def make_path_absolute(path: str | Path) -> str:
    """Return the absolute path, with `~` and environment variables expanded."""
    return str(Path(os.path.expandvars(path)).expanduser().absolute())


def get_configs_path() -> str:
    """Return the folder `configs` of this repository, or of the installed package."""
    root = Path(__file__).resolve().parents[1]
    installed = root / "cogvideox_sat" / "shipped"
    return str((installed if installed.is_dir() else root) / "configs")
