"""Find sizes of a model that the shapes of its tensors do not show.

These are sizes of the largest clip, the text and the latents. They are read off tables of positions in the checkpoint,
if there are any, and else from a configuration.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cogvideox_sat.configuration.files import load_configs
from cogvideox_sat.conversion.released_models import CONFIGS, TITLES
from cogvideox_sat.conversion.weight_family import UNUSED_POSITIONS, NetworkFamily
from cogvideox_sat.files.shipped import CONFIGS as CONFIG_FOLDER
from cogvideox_sat.latent_geometry import TIME_FACTOR
from cogvideox_sat.network.position_tables import rotary_angles, sincos_3d
from cogvideox_sat.weights.diffusers_names import FREQUENCIES, POSITION_TABLE, UNUSED_TABLE
from sgm.errors import UserError

TOLERANCE = 1e-2  # for sines and cosines that were rounded to bfloat16


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model.

    Attributes:
        num_frames, latent_height, latent_width: size of the largest clip, with frames in pixel space.
        text_length: tokens of the text.
        interpolation: divisor of coordinates in a sin-cos table.
        scale_factor: factor of latents.
        shift_scale: parameter of the noise schedule.
    """

    num_frames: int
    latent_height: int
    latent_width: int
    text_length: int
    interpolation: float
    scale_factor: float
    shift_scale: float

    def grid(self, patch: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the (frames, height, width) of the largest clip in patches.

        1.0 models do not patch time, and 1.5 models have no table.
        """
        return (self.num_frames - 1) // TIME_FACTOR + 1, self.latent_height // patch[1], self.latent_width // patch[2]


def released_config(family: NetworkFamily) -> dict[str, Any]:
    """Return the configuration of the released model of a family."""
    return load_configs([CONFIG_FOLDER / f"{CONFIGS[family.name]}.yaml"])


def sizes_of_config(config: Mapping[str, Any], family: NetworkFamily, source: str) -> ModelSizes:
    """Return the sizes in a configuration.

    Args:
        source: the configuration in messages.

    Raises:
        UserError: the configuration is of another model, or lacks a size.
    """
    try:
        model = config["model"]
        params = model["network_config"]["params"]
        position = params["modules"]["pos_embed_config"]["params"]
        ours = {name: params.get(name) for name in family.parameters()}
        schedule = model["sampler_config"]["params"]["discretization_config"].get("params") or {}
        interpolation = (position.get("height_interpolation"), params.get("height_interpolation"))
        sizes = ModelSizes(
            num_frames=int(params["num_frames"]),
            latent_height=int(params["latent_height"]),
            latent_width=int(params["latent_width"]),
            text_length=int(position["text_length"]),
            interpolation=float(next((value for value in interpolation if value), 1.0)),
            scale_factor=float(model["scale_factor"]),
            shift_scale=float(schedule.get("shift_scale", 1.0)),
        )
    except KeyError as error:
        raise UserError(f"{source} does not describe a model: {error} is missing; give a model's file too") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{source} does not describe a model: {error}; give a model's file") from error
    for name, value in family.parameters().items():
        if ours[name] != value:
            raise UserError(
                f"{source} is of another model: it has {name} {ours[name]}, the weights have {value}; name the "
                "configuration of these weights"
            )
    return sizes


def sizes_of_tables(tables: Mapping[str, Tensor], family: NetworkFamily, source: str) -> dict[str, Any]:
    """Return the `ModelSizes` that the tables of positions in a checkpoint determine, by name.

    Args:
        tables: of any dtype; sines and cosines (n, features of a head), positions (1, text length + n, hidden_size).

    Raises:
        UserError: a table is not one that the network would compute, so that diffusers could not compute it either.
    """
    _check_table_shapes(tables, family, source)
    if family.stores_frequencies and all(name in tables for name in FREQUENCIES):
        sin, cos = (tables[name].float() for name in FREQUENCIES)
        axes = (family.head_dim // 4, family.head_dim // 4 + family.head_dim * 3 // 8)
        grid = _grid_of(sin[:, axes[0]], sin[:, axes[1]])
        angles = rotary_angles(family.head_dim, grid)
        if angles.shape != sin.shape or not _close(angles.sin(), sin) or not _close(angles.cos(), cos):
            raise UserError(f"{source}: its table of frequencies is not that of any grid of patches")
        found = _clip(grid, family)
        if POSITION_TABLE in tables:
            found["text_length"] = tables[POSITION_TABLE].shape[1] - math.prod(grid)
        return found
    if not family.rotary and POSITION_TABLE in tables:
        return _sizes_of_sincos(tables[POSITION_TABLE][0].float(), family, source)
    return {}


def _check_table_shapes(tables: Mapping[str, Tensor], family: NetworkFamily, source: str) -> None:
    """Check the dimensions of the tables that `sizes_of_tables` reads, else raise UserError."""
    wanted: dict[str, tuple[int, ...]] = {}
    if family.stores_frequencies:
        wanted = dict.fromkeys(FREQUENCIES, (-1, family.head_dim))
    # The width of a learnt table, of which only the length is read, is checked with the network's other tensors.
    wanted[POSITION_TABLE] = (1, -1, -1 if family.rotary else family.hidden_size)
    for name, shape in wanted.items():
        found = tuple(tables[name].shape) if name in tables else shape
        if len(found) != len(shape) or 0 in found or any(a != b for a, b in zip(found, shape, strict=True) if b > 0):
            expected = str(list(shape)).replace("-1", "n")
            raise UserError(f"{source}: {name} has the shape {list(found)}; expected {expected}")


def _sizes_of_sincos(table: Tensor, family: NetworkFamily, source: str) -> dict[str, Any]:
    """Return the sizes that a sin-cos table of positions determines.

    Args:
        table: (text + patches, hidden_size); zeros for text; for each of time, width and height first sines, then
            cosines.
    """
    used = table.abs().amax(1) > 0
    text_length = int(used.int().argmax()) if used.any() else len(table)
    video = table[text_length:]
    if not len(video):
        raise UserError(f"{source}: its table of positions is empty")
    time, axis = family.hidden_size // 4, family.hidden_size * 3 // 8
    grid = _grid_of(video[:, time + axis], video[:, time])
    _, height, width = grid
    along, count = (video[:width, time : time + axis], width) if width > 1 else (video[::width], height)
    interpolation = _interpolation(along[:count], axis) if count > 1 else 1.0
    expected = sincos_3d(family.hidden_size, grid, 1.0, interpolation, interpolation)
    if expected.shape != video.shape or not _close(expected, video):
        raise UserError(
            f"{source}: its table of positions is not the sin-cos one of {grid} patches, and diffusers has no other"
        )
    return {**_clip(grid, family), "text_length": text_length, "interpolation": interpolation}


def _interpolation(rows: Tensor, dim: int) -> float:
    """Return the divisor of coordinates 0, 1, 2, ... in their (n, dim) sines and cosines.

    The first step gives an estimate. The angle at the last row, including full turns, gives a more accurate value.
    """
    angles = torch.atan2(rows[:, 0], rows[:, dim // 2]).double()
    last = len(rows) - 1
    turns = torch.round((angles[1] * last - angles[last]) / (2 * math.pi))
    return round(float(last / (angles[last] + 2 * math.pi * turns)), 4)


def _grid_of(rows: Tensor, columns: Tensor) -> tuple[int, int, int]:
    """Return the grid whose patches have these sines of row and column, 0 at each start."""
    width = _next_zero(columns)
    height = _next_zero(rows[::width])
    return len(rows) // (width * height), height, width


def _next_zero(values: Tensor) -> int:
    zeros = torch.nonzero(values[1:] == 0)
    return int(zeros[0]) + 1 if len(zeros) else len(values)


def _clip(grid: tuple[int, int, int], family: NetworkFamily) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "num_frames": (frames - 1) * TIME_FACTOR + 1,
        "latent_height": height * family.patch[1],
        "latent_width": width * family.patch[2],
    }


def _close(expected: Tensor, table: Tensor) -> bool:
    return bool((expected - table).abs().max() <= TOLERANCE)


def combined(config: ModelSizes, found: Mapping[str, Any], source: str | None) -> ModelSizes:
    """Return the sizes of a configuration, replaced by those `found` in tables.

    Args:
        source: the configuration in messages, if it must agree with the tables; None: the released model's, which need
            not.

    Raises:
        UserError: the sizes differ, but must agree.
    """
    for name, value in found.items():
        stated = getattr(config, name)
        if source and not math.isclose(stated, value, rel_tol=1e-3):
            raise UserError(
                f"{source} is of another model: it has {name} {stated:g}, the weights have {value:g}; name the "
                "configuration of these weights"
            )
    return ModelSizes(**{**asdict(config), **found})


def computed_tables(
    family: NetworkFamily, sizes: ModelSizes, dtype: torch.dtype, unused_rows: int = UNUSED_POSITIONS
) -> dict[str, Tensor]:
    """Return a checkpoint's tables that follow from the sizes, by our names.

    With n tokens of a video, h features and d of a head: positions (1, text length + n, h), zeros for the text; sines
    and cosines (n, d); the unused table (unused_rows, h), which holds zeros.
    """
    grid, tables = sizes.grid(family.patch), {}
    if family.rotary:
        tables[UNUSED_TABLE] = torch.zeros(unused_rows, family.hidden_size, dtype=dtype)
    else:
        video = sincos_3d(family.hidden_size, grid, 1.0, sizes.interpolation, sizes.interpolation).to(dtype)
        tables[POSITION_TABLE] = torch.nn.functional.pad(video, (0, 0, sizes.text_length, 0))[None]
    if family.stores_frequencies:
        angles = rotary_angles(family.head_dim, grid)
        tables |= {FREQUENCIES[0]: angles.sin().to(dtype), FREQUENCIES[1]: angles.cos().to(dtype)}
    return tables


def title(family: NetworkFamily) -> str:
    """Return the released model's name with depth and width, for messages."""
    return f"{TITLES[family.name]} ({family.num_layers} layers of width {family.hidden_size})"
