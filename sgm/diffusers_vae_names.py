"""Names of the video autoencoder's tensors here and in diffusers' AutoencoderKLCogVideoX.

    encoder.down.1.block.0.nin_shortcut.weight  ↔  encoder.down_blocks.1.resnets.0.conv_shortcut.weight
    decoder.up.3.block.0.norm1.conv_y.conv.bias ↔  decoder.up_blocks.0.resnets.0.norm1.conv_y.conv.bias

Each tensor has one counterpart of the same shape. The decoder's levels are numbered from the finest here, and from the
coarsest in diffusers.
"""

import re
from collections.abc import Callable, Iterable

_OURS = re.compile(
    r"(encoder|decoder)\.(?:(down|up)\.(\d+)\.(?:(block)\.(\d+)|downsample|upsample)|mid\.block_(\d))\.(.+)"
)
_THEIRS = re.compile(
    r"(encoder|decoder)\.(?:(down|up)_blocks\.(\d+)\.(?:(resnets)\.(\d+)|downsamplers\.0|upsamplers\.0)"
    r"|mid_block\.resnets\.(\d))\.(.+)"
)
_DIFFUSERS_MARKS = ("encoder.down_blocks.", "decoder.up_blocks.")


def is_diffusers_vae(names: Iterable[str]) -> bool:
    """Return whether tensors have the names of diffusers' video autoencoder."""
    return any(name.startswith(_DIFFUSERS_MARKS) for name in names)


def to_diffusers(names: Iterable[str]) -> dict[str, str]:
    """Return a mapping from diffusers' names to ours.

    Args:
        names: our names of a whole autoencoder's tensors.
    """
    names = list(names)
    levels = _count_levels(names, r"decoder\.up\.(\d+)\.")
    return {diffusers_name(name, levels): name for name in names}


def from_diffusers(names: Iterable[str]) -> dict[str, str]:
    """Return a mapping from our names to diffusers'.

    Args:
        names: diffusers' names of a whole autoencoder's tensors.
    """
    names = list(names)
    levels = _count_levels(names, r"decoder\.up_blocks\.(\d+)\.")
    return {_translate(name, _THEIRS, levels, _our_name): name for name in names}


def diffusers_name(name: str, levels: int) -> str:
    """Return diffusers' name of a tensor of ours, for an autoencoder with `levels` levels."""
    return _translate(name, _OURS, levels, _their_name)


def _count_levels(names: Iterable[str], pattern: str) -> int:
    return max((int(match[1]) + 1 for name in names if (match := re.match(pattern, name))), default=0)


def _translate(name: str, pattern: re.Pattern[str], levels: int, build: Callable[..., str]) -> str:
    match = pattern.fullmatch(name)
    if match is None:
        return name  # names outside the levels are the same
    half, direction, level, block, number, mid, rest = match.groups()
    if direction == "up":
        level = levels - 1 - int(level)
    return f"{half}." + build(direction, level, block and number, mid, rest)


def _their_name(direction: str | None, level: int | None, number: str | None, mid: str | None, rest: str) -> str:
    rest = rest.replace("nin_shortcut", "conv_shortcut")
    if mid is not None:
        return f"mid_block.resnets.{int(mid) - 1}.{rest}"
    if number is None:
        return f"{direction}_blocks.{level}.{direction}samplers.0.{rest}"
    return f"{direction}_blocks.{level}.resnets.{number}.{rest}"


def _our_name(direction: str | None, level: int | None, number: str | None, mid: str | None, rest: str) -> str:
    rest = rest.replace("conv_shortcut", "nin_shortcut")
    if mid is not None:
        return f"mid.block_{int(mid) + 1}.{rest}"
    if number is None:
        return f"{direction}.{level}.{direction}sample.{rest}"
    return f"{direction}.{level}.block.{number}.{rest}"
