"""Read lists of adapters with their strengths, `PATH:0.8`.

Nothing here imports PyTorch.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from cogvideox_sat.commands.input_paths import find_input, required_input
from cogvideox_sat.configuration.model_section import without_adapter
from sgm.errors import UserError, shown

Adapters: TypeAlias = Mapping[str | Path, float] | Sequence[str | Path] | str | Path
"""Paths of adapters with their strengths; or one or more paths, each with strength 1."""


def path_and_weight(text: str, argument: str = "--lora") -> tuple[Path, float]:
    """Return the path and the weight of `PATH[:WEIGHT]`; the path itself may contain colons.

    Raises:
        UserError: the weight is not a number; the message begins with `argument`.
    """
    path, separator, weight = text.rpartition(":")
    if not separator or find_input(text, argument):
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{argument} {text}: '{weight}' is not a number; write PATH:0.8")
    return Path(path), value


def located_adapters(texts: Sequence[str], argument: str) -> list[tuple[Path, float]]:
    """Return the paths of adapters, as found on the disk, and their weights.

    Raises:
        UserError: a path does not exist, or a weight is not a number.
    """
    chosen = [path_and_weight(text, argument) for text in texts]
    return [(required_input(path, argument), weight) for path, weight in chosen]


def adapter_texts(lora: Any) -> list[str]:
    """Return the adapters that a program names in the form of the command: `PATH:WEIGHT` each.

    Args:
        lora: a mapping of paths to weights; or a path or a list of paths, which get the weight 1.

    Raises:
        UserError: `lora` is something else.
    """
    if isinstance(lora, str | Path):
        lora = [lora]
    weights: dict[Any, Any] = dict(lora) if isinstance(lora, Mapping) else {None: None}
    if _is_list(lora):
        weights = dict.fromkeys(lora, 1.0)
    for path, weight in weights.items():
        if not isinstance(path, str | Path):
            raise UserError(f"lora: got {shown(lora)}; give paths with their strengths, such as {{'style': 0.8}}")
        if type(weight) not in (int, float) or not math.isfinite(weight):
            raise UserError(f"lora: the strength of {path}: got {shown(weight)}; give a number such as 0.8")
    return [f"{path}:{weight!r}" for path, weight in weights.items()]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str | Path) for item in value)


def settle_adapters(args: Any) -> None:
    """Replace the adapters in `args` by located ones, and remove the model's own adapter.

    Raises:
        UserError: an adapter does not exist, or other arguments cannot be combined with adapters.
    """
    if not args.lora:
        return
    if args.lora_load:
        raise UserError("lora: lora_load is given too; name all adapters in lora")
    if args.model_parallel_size > 1:
        raise UserError(
            f"lora: adapters cannot be used with model_parallel_size {args.model_parallel_size}; merge them first, "
            "with tools/merge_lora.py"
        )
    args.lora = [f"{path}:{weight!r}" for path, weight in located_adapters(args.lora, "lora")]
    args.model_config = without_adapter(args.model_config)
