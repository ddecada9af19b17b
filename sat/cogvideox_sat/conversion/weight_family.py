"""Detect the family of a CogVideoX model from the names and shapes of its tensors.

Names are those of SwissArmyTransformer's checkpoints, without their prefix.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cogvideox_sat.conversion.released_models import TITLES
from cogvideox_sat.weights.diffusers_names import FREQUENCIES, POSITION_TABLE, TABLES, UNUSED_TABLE
from sgm.errors import UserError, some

Shapes = Mapping[str, tuple[int, ...]]

UNUSED_POSITIONS = 64  # rows of `UNUSED_TABLE`


@dataclass(frozen=True)
class NetworkFamily:
    """Properties of a network that its tensors determine.

    Attributes:
        name: a key of `released_models.CONFIGS`.
        patch: (frames, height, width).
    """

    name: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    in_channels: int
    out_channels: int
    patch: tuple[int, int, int]
    time_embed_dim: int
    text_hidden_size: int
    ofs_embed_dim: int | None

    @property
    def head_dim(self) -> int:
        """Return the features of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def is_15(self) -> bool:
        """Return whether the network is of CogVideoX1.5."""
        return self.name.startswith("1.5")

    @property
    def image_to_video(self) -> bool:
        """Return whether the input has the channels of a given picture."""
        return self.name.endswith("i2v")

    @property
    def rotary(self) -> bool:
        """Return whether positions rotate queries and keys; otherwise they are added."""
        return self.name != "2b"

    @property
    def learnt_positions(self) -> bool:
        """Return whether a table of positions is trained."""
        return self.name == "5b_i2v"

    @property
    def stores_frequencies(self) -> bool:
        """Return whether checkpoints hold sines and cosines of the rotation."""
        return self.rotary and not self.is_15

    def parameters(self) -> dict[str, Any]:
        """Return the properties by their names in `network_config.params`."""
        o, p, q = self.patch
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "patch_size": [o, p, q] if self.is_15 else p,
            "time_embed_dim": self.time_embed_dim,
            "ofs_embed_dim": self.ofs_embed_dim,
        }


def detect_network(shapes: Shapes, source: str, rotary: bool | None = None) -> NetworkFamily:
    """Return the family of a network with tensors of these shapes.

    Args:
        source: the tensors in messages.
        rotary: positions are rotary, if computed tables are not among the tensors; None: the tables show it.

    Raises:
        UserError: tensors are missing, unknown or of a shape that does not fit the others, or the family is unknown.
    """
    needed = ("mixins.patch_embed.proj.weight", "mixins.patch_embed.text_proj.weight", "time_embed.0.weight",
              "mixins.final_layer.linear.weight", "mixins.adaln_layer.query_layernorm_list.0.weight")  # fmt: skip
    if missing := [name for name in needed if name not in shapes]:
        raise UserError(f"{source} is not a CogVideoX network: it has no {missing[0]}; name a checkpoint of one")
    proj, text, time, last, norm = (shapes[name] for name in needed)
    ofs = shapes.get("ofs_embed.0.weight")
    dimensions = [len(shape) for shape in (text, time, last, norm, ofs or time)]
    if len(proj) not in (2, 4) or dimensions != [2, 2, 2, 1, 2] or 0 in (*proj, *norm) or proj[0] % norm[0]:
        described = ", ".join(f"{name} is {list(shapes[name])}" for name in needed)
        raise UserError(f"{source} is not a CogVideoX network: {described}; name a checkpoint of one")
    rows, head_dim = last[0], norm[0]
    is_15 = len(proj) == 2
    patch = (2, 2, 2) if is_15 else (1, proj[2], proj[3])
    volume = patch[0] * patch[1] * patch[2]
    in_channels, out_channels = (proj[1] // volume if is_15 else proj[1]), rows // volume
    if rotary is None:
        rotary = is_15 or any(name in shapes for name in FREQUENCIES)
    family = NetworkFamily(
        name=_family_name(
            source, is_15, in_channels, out_channels, rotary, POSITION_TABLE in shapes and rotary, ofs is not None
        ),
        num_layers=len({match[1] for name in shapes if (match := re.match(r"transformer\.layers\.(\d+)\.", name))}),
        hidden_size=proj[0],
        num_attention_heads=proj[0] // head_dim,
        in_channels=in_channels,
        out_channels=out_channels,
        patch=patch,
        time_embed_dim=time[0],
        text_hidden_size=text[1],
        ofs_embed_dim=ofs[1] if ofs else None,
    )
    check_shapes(shapes, network_shapes(family), f"{source}, {TITLES[family.name]} by its tensors,")
    return family


def _family_name(
    source: str, is_15: bool, in_channels: int, out_channels: int, rotary: bool, learnt: bool, has_ofs: bool
) -> str:
    """Return the name of the family with these properties.

    Raises:
        UserError: the family does not exist.
    """
    version = "1.5" if is_15 else "1.0"
    if in_channels not in (out_channels, 2 * out_channels) or not out_channels:
        raise UserError(
            f"{source} is of no known family: it has {in_channels} input and {out_channels} output channels; "
            "text-to-video has equal numbers, image-to-video twice as many inputs"
        )
    image = in_channels == 2 * out_channels
    families = {  # version, image-to-video, rotary, learnt positions, ofs
        ("1.0", False, False, False, False): "2b",
        ("1.0", False, True, False, False): "5b",
        ("1.0", True, True, True, False): "5b_i2v",
        ("1.5", False, True, False, False): "1.5",
        ("1.5", True, True, False, True): "1.5_i2v",
    }
    key = (version, image, rotary, learnt, has_ofs)
    if key not in families:
        positions = "rotary and learnt" if learnt else "rotary" if rotary else "sin-cos"
        raise UserError(
            f"{source} is of no known family: {version}, {'image' if image else 'text'}-to-video, with {positions} "
            f"positions, {'with' if has_ofs else 'without'} ofs; known are {', '.join(TITLES.values())}"
        )
    return families[key]


def network_shapes(family: NetworkFamily) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a network except `TABLES`, by name."""
    d, e, head_dim = family.hidden_size, family.time_embed_dim, family.head_dim
    o, p, q = family.patch
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    linear("mixins.patch_embed.proj", d, family.in_channels * o * p * q)
    if not family.is_15:
        shapes["mixins.patch_embed.proj.weight"] = (d, family.in_channels, p, q)
    linear("mixins.patch_embed.text_proj", d, family.text_hidden_size)
    for i in range(family.num_layers):
        layer = f"transformer.layers.{i}"
        norm(f"{layer}.input_layernorm", d)
        linear(f"{layer}.attention.query_key_value", 3 * d, d)
        linear(f"{layer}.attention.dense", d, d)
        norm(f"{layer}.post_attention_layernorm", d)
        linear(f"{layer}.mlp.dense_h_to_4h", 4 * d, d)
        linear(f"{layer}.mlp.dense_4h_to_h", d, 4 * d)
        linear(f"mixins.adaln_layer.adaLN_modulations.{i}.1", 12 * d, e)
        norm(f"mixins.adaln_layer.query_layernorm_list.{i}", head_dim)
        norm(f"mixins.adaln_layer.key_layernorm_list.{i}", head_dim)
    norm("transformer.final_layernorm", d)
    norm("mixins.final_layer.norm_final", d)
    linear("mixins.final_layer.linear", o * p * q * family.out_channels, d)
    linear("mixins.final_layer.adaLN_modulation.1", 2 * d, e)
    for name, width in (("time_embed", d), ("ofs_embed", family.ofs_embed_dim)):
        if width is not None:
            linear(f"{name}.0", e, width)
            linear(f"{name}.2", e, e)
    return shapes


def table_shapes(family: NetworkFamily, grid: tuple[int, int, int], text_length: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's `TABLES`, for `grid` patches of the largest clip."""
    tokens = grid[0] * grid[1] * grid[2]
    shapes: dict[str, tuple[int, ...]] = {}
    if family.rotary:
        shapes[UNUSED_TABLE] = (UNUSED_POSITIONS, family.hidden_size)
    if family.stores_frequencies:
        shapes |= dict.fromkeys(FREQUENCIES, (tokens, family.head_dim))
    if family.learnt_positions or not family.rotary:
        shapes[POSITION_TABLE] = (1, text_length + tokens, family.hidden_size)
    return shapes


@dataclass(frozen=True)
class AutoencoderFamily:
    """Properties of a video autoencoder that its tensors determine.

    Attributes:
        widths: channels of the levels, the finest level first.
    """

    widths: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    in_channels: int


def detect_autoencoder(shapes: Shapes, source: str) -> AutoencoderFamily:
    """Return the properties of an autoencoder with tensors of these shapes.

    Raises:
        UserError: it is not a CogVideoX autoencoder, or tensors are missing, unknown or of another shape.
    """
    widths, blocks = _levels(shapes, "encoder.down")
    up_widths, up_blocks = _levels(shapes, "decoder.up")
    first, last = (shapes.get(f"{name}.conv.weight") for name in ("encoder.conv_in", "decoder.conv_in"))
    if not first or not last or len(first) != 5 or len(last) != 5 or not widths or not all(widths):
        raise UserError(
            f"{source} is not a CogVideoX autoencoder: it lacks encoder.conv_in, decoder.conv_in or their levels"
        )
    if (up_widths, up_blocks) != (widths, blocks + 1):
        raise UserError(
            f"{source} is not a CogVideoX autoencoder: the levels of its decoder have {list(up_widths)} channels and "
            f"{up_blocks} blocks, the levels of its encoder {list(widths)} and {blocks}; expected the same channels "
            "and one more block"
        )
    family = AutoencoderFamily(widths, blocks, z_channels=last[1], in_channels=first[1])
    check_shapes(shapes, autoencoder_shapes(family), source)
    return family


def _levels(shapes: Shapes, where: str) -> tuple[tuple[int, ...], int]:
    """Return the channels of a coder's levels, finest first, and the finest level's blocks."""
    first = [m[1] for name in shapes if (m := re.fullmatch(rf"{where}\.(\d+)\.block\.0\.conv1\.conv\.weight", name))]
    blocks = [name for name in shapes if re.fullmatch(rf"{where}\.0\.block\.\d+\.conv1\.conv\.weight", name)]
    convolutions = [shapes[f"{where}.{i}.block.0.conv1.conv.weight"] for i in sorted(map(int, first))]
    return tuple(shape[0] if shape else 0 for shape in convolutions), len(blocks)


def autoencoder_shapes(family: AutoencoderFamily) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of an autoencoder, by name."""
    widths, z = family.widths, family.z_channels
    shapes: dict[str, tuple[int, ...]] = {}

    def tensor(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    def conv(name: str, out: int, into: int, kernel: int = 3) -> None:
        tensor(f"{name}.conv", out, into, kernel, kernel, kernel)

    def norm(name: str, width: int, spatial: bool) -> None:
        if not spatial:
            return tensor(name, width)
        tensor(f"{name}.norm_layer", width)
        conv(f"{name}.conv_y", width, z, 1)
        return conv(f"{name}.conv_b", width, z, 1)

    def block(name: str, into: int, out: int, spatial: bool) -> None:
        norm(f"{name}.norm1", into, spatial)
        conv(f"{name}.conv1", out, into)
        norm(f"{name}.norm2", out, spatial)
        conv(f"{name}.conv2", out, out)
        if into != out:
            tensor(f"{name}.nin_shortcut", out, into, 1, 1, 1)

    for half, spatial in (("encoder", False), ("decoder", True)):
        order = list(enumerate(widths)) if half == "encoder" else list(enumerate(widths))[::-1]
        width = order[0][1]
        conv(f"{half}.conv_in", width, z if spatial else family.in_channels)
        if spatial:
            for i in (1, 2):
                block(f"{half}.mid.block_{i}", width, width, spatial)
        for i, out in order:
            level = f"{half}.{'up' if spatial else 'down'}.{i}"
            for j in range(family.num_res_blocks + spatial):
                block(f"{level}.block.{j}", width, out, spatial)
                width = out
            if i != order[-1][0]:
                tensor(f"{level}.{'up' if spatial else 'down'}sample.conv", out, out, 3, 3)
        if not spatial:
            for i in (1, 2):
                block(f"{half}.mid.block_{i}", width, width, spatial)
        norm(f"{half}.norm_out", width, spatial)
        conv(f"{half}.conv_out", family.in_channels if spatial else 2 * z, width)
    return shapes


def check_shapes(shapes: Shapes, expected: Shapes, source: str, ignored: tuple[str, ...] = TABLES) -> None:
    """Check that the tensors are exactly those expected, except `ignored`.

    Raises:
        UserError: tensors are missing, unknown or of another shape.
    """
    if missing := [name for name in expected if name not in shapes]:
        raise UserError(f"{source} lacks {some(missing)}; copy or download all files")
    if unknown := [name for name in shapes if name not in expected and name not in ignored]:
        raise UserError(f"{source} has {some(unknown)}, which such a model does not have")
    wrong = [name for name in expected if tuple(shapes[name]) != tuple(expected[name])]
    if wrong:
        described = some([f"{name} {list(shapes[name])} instead of {list(expected[name])}" for name in wrong])
        raise UserError(f"{source} has {described}")
