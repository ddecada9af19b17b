"""Map tensor names of the network to those of diffusers and back.

The class in diffusers is CogVideoXTransformer3DModel. Most tensors have one counterpart under another name. Two kinds
are divided differently:
    transformer.layers.N.attention.query_key_value   ↔  transformer_blocks.N.attn1.to_q, to_k, to_v
    mixins.adaln_layer.adaLN_modulations.N.1         ↔  transformer_blocks.N.norm1.linear, norm2.linear

A modulation has twelve chunks: for vision, then for text, each of them shift, scale and gate of the attention, then of
the MLP. diffusers keeps those of the attention, for vision and text, in `norm1`, and those of the MLP in `norm2`.

The composition of a tensor is a list of `Piece`s: consecutive rows from tensors of the other side. Position tables that
follow from the sizes of the model have no counterpart; see `TABLES`. The names of the autoencoder are in
`sgm.diffusers_vae_names`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sgm.errors import UserError

FREQUENCIES = ("mixins.pos_embed.freqs_sin", "mixins.pos_embed.freqs_cos")
POSITION_TABLE = "mixins.pos_embed.pos_embedding"  # learnt in networks with frequencies, otherwise computed
UNUSED_TABLE = "transformer.position_embeddings.weight"  # SwissArmyTransformer's table, which rotary models do not use
TABLES = (UNUSED_TABLE, *FREQUENCIES, POSITION_TABLE)
# A file in the folder of diffusers' network, with those of `TABLES` that differ from newly computed ones.
EXTRA_TABLES = "sat_tables.safetensors"

# Our names and those of diffusers, without `.weight` and `.bias`.
_OUTSIDE_LAYERS = {
    "mixins.patch_embed.proj": "patch_embed.proj",
    "mixins.patch_embed.text_proj": "patch_embed.text_proj",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "ofs_embed.0": "ofs_embedding.linear_1",
    "ofs_embed.2": "ofs_embedding.linear_2",
    "transformer.final_layernorm": "norm_final",
    "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
    "mixins.final_layer.linear": "proj_out",
}
_IN_LAYERS = {
    "transformer.layers.{}.input_layernorm": "transformer_blocks.{}.norm1.norm",
    "transformer.layers.{}.post_attention_layernorm": "transformer_blocks.{}.norm2.norm",
    "transformer.layers.{}.attention.dense": "transformer_blocks.{}.attn1.to_out.0",
    "transformer.layers.{}.mlp.dense_h_to_4h": "transformer_blocks.{}.ff.net.0.proj",
    "transformer.layers.{}.mlp.dense_4h_to_h": "transformer_blocks.{}.ff.net.2",
    "mixins.adaln_layer.query_layernorm_list.{}": "transformer_blocks.{}.attn1.norm_q",
    "mixins.adaln_layer.key_layernorm_list.{}": "transformer_blocks.{}.attn1.norm_k",
}
_QKV, _TO_QKV = (
    "transformer.layers.{}.attention.query_key_value",
    [f"transformer_blocks.{{}}.attn1.to_{x}" for x in "qkv"],
)
_MODULATION, _NORMS = (
    "mixins.adaln_layer.adaLN_modulations.{}.1",
    [f"transformer_blocks.{{}}.norm{i}.linear" for i in (1, 2)],
)
_NAME = re.compile(r"(.+)\.(weight|bias)")
_LAYER = re.compile(r"(?:transformer\.layers|_list|adaLN_modulations|transformer_blocks)\.(\d+)(?=\.|$)")


class Piece(NamedTuple):
    """The `index`-th of `count` equal parts of the rows of the tensor `name`."""

    name: str
    index: int = 0  # type: ignore[assignment]  # tuple methods of the same name, which are not called here
    count: int = 1  # type: ignore[assignment]

    def __str__(self) -> str:
        return self.name if self.count == 1 else f"{self.name} [{self.index + 1}/{self.count}]"


Pieces = tuple[Piece, ...]


def is_diffusers_network(names: Iterable[str]) -> bool:
    """Return whether the names are those of diffusers' network."""
    return any(name.startswith("transformer_blocks.") for name in names)


def to_diffusers(names: Iterable[str], where: str = "the checkpoint") -> dict[str, Pieces]:
    """Return the composition of each tensor of diffusers' network.

    Args:
        names: names of all our tensors, including `TABLES`.
        where: the file of the tensors, for errors.

    Raises:
        UserError: a name does not belong to a CogVideoX network.
    """
    names = list(names)
    learnt = any(name in FREQUENCIES for name in names)
    pieces: dict[str, Pieces] = {}
    for name in names:
        if name in TABLES:
            if name == POSITION_TABLE and learnt:
                pieces["patch_embed.pos_embedding"] = (Piece(name),)
            continue
        pattern, layer, end = _split(name)
        if pattern == _QKV:
            for i, part in enumerate(_TO_QKV):
                pieces[part.format(layer) + end] = (Piece(name, i, 3),)
        elif pattern == _MODULATION:
            for norm, start in zip(_NORMS, (0, 3), strict=True):
                chunks = (*range(start, start + 3), *range(start + 6, start + 9))
                pieces[norm.format(layer) + end] = tuple(Piece(name, i, 12) for i in chunks)
        elif pattern in _IN_LAYERS:
            pieces[_IN_LAYERS[pattern].format(layer) + end] = (Piece(name),)
        elif pattern in _OUTSIDE_LAYERS:
            pieces[_OUTSIDE_LAYERS[pattern] + end] = (Piece(name),)
        else:
            raise UserError(f"{where}: '{name}' is not a tensor of a CogVideoX network; name a checkpoint of one")
    return pieces


def from_diffusers(names: Iterable[str], where: str = "the checkpoint") -> dict[str, Pieces]:
    """Return the composition of each tensor of our network, except for computed `TABLES`.

    Args:
        names: names of all tensors of diffusers.
        where: the file of the tensors, for errors.

    Raises:
        UserError: a name does not belong to a CogVideoX network, or a part of a tensor is missing.
    """
    names = list(names)
    there = set(names)
    outside = {theirs: ours for ours, theirs in _OUTSIDE_LAYERS.items()}
    inside = {theirs: ours for ours, theirs in _IN_LAYERS.items()}
    pieces: dict[str, Pieces] = {}
    for name in names:
        if name == "patch_embed.pos_embedding":
            pieces[POSITION_TABLE] = (Piece(name),)
            continue
        pattern, layer, end = _split(name)
        if pattern in _TO_QKV:
            parts = [part.format(layer) + end for part in _TO_QKV]
            pieces[_QKV.format(layer) + end] = tuple(Piece(part) for part in parts)
        elif pattern in _NORMS:
            parts = [norm.format(layer) + end for norm in _NORMS]
            chunks = [Piece(part, i, 6) for half in (range(3), range(3, 6)) for part in parts for i in half]
            pieces[_MODULATION.format(layer) + end] = tuple(chunks)
        elif pattern in inside:
            pieces[inside[pattern].format(layer) + end] = (Piece(name),)
            continue
        elif pattern in outside:
            pieces[outside[pattern] + end] = (Piece(name),)
            continue
        else:
            raise UserError(
                f"{where}: '{name}' is not a tensor of a CogVideoX network of diffusers; name a checkpoint of one"
            )
        if missing := [part for part in parts if part not in there]:
            raise UserError(f"{where}: '{missing[0]}' is missing, but '{name}' exists; copy or download all files")
    return pieces


def _split(name: str) -> tuple[str, str, str]:
    """Return the name with `{}` for the layer number, that number, and `.weight` or `.bias`."""
    match = _NAME.fullmatch(name)
    if match is None:
        return name, "", ""
    stem, end = match.groups()
    layer = _LAYER.search(stem)
    if layer is None:
        return stem, "", f".{end}"
    return f"{stem[: layer.start(1)]}{{}}{stem[layer.end(1) :]}", layer[1], f".{end}"


def assemble(pieces: Pieces, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor that the pieces make; a view if it is a single piece."""
    rows = rows_of(pieces, tensors)
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def rows_of(pieces: Pieces, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return views of `tensors` whose concatenation is the tensor that the pieces make."""
    parts: dict[str, Tensor] = {}  # each tensor is read only once
    for name in dict.fromkeys(piece.name for piece in pieces):
        parts[name] = tensors[name]
    return [parts[name].chunk(count)[index] if count > 1 else parts[name] for name, index, count in pieces]


def check_divisible(pieces: Mapping[str, Pieces], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Check that all tensors can be divided and joined as `pieces` say, else raise UserError."""
    for target, parts in pieces.items():
        for name, _, count in parts:
            shape = shapes[name]
            if len(parts) * count > 1 and (not shape or shape[0] % count):
                raise UserError(
                    f"{where}: {name} has shape {list(shape)}, which does not divide into {count} for {target}; "
                    "download the files again"
                )
        if len({shapes[name][1:] for name, _, _ in parts}) > 1:
            described = ", ".join(map(str, parts))
            raise UserError(f"{where}: {described} do not fit together as {target}; download the files again")


def assembled_shape(pieces: Pieces, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of the tensor that the pieces make."""
    if len(pieces) == 1 and pieces[0].count == 1:
        return shapes[pieces[0].name]
    return sum(shapes[name][0] // count for name, _, count in pieces), *shapes[pieces[0].name][1:]
