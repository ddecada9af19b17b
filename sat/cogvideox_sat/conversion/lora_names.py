"""Translate names of LoRA tensors between SwissArmyTransformer and diffusers.

Nothing here imports PyTorch. One projection of one layer has two matrices, A (rank, in) and B (out, rank).
"""

import re
from typing import NamedTuple

LORA_FILE = "pytorch_lora_weights.safetensors"  # the file that diffusers looks for in a folder
# For each module of SwissArmyTransformer's layer, its adapted projections by their names in diffusers, in order.
PROJECTIONS_OF = {"query_key_value": ("to_q", "to_k", "to_v"), "dense": ("to_out.0",)}
# For each projection, its module and the number of its A and B there.
PROJECTIONS = {name: (module, number) for module, names in PROJECTIONS_OF.items() for number, name in enumerate(names)}

_SAT = re.compile(r"transformer\.layers\.(\d+)\.attention\.(query_key_value|dense)\.matrix_([AB])\.(\d+)")
# Names begin with `transformer.` in files of diffusers' pipelines, with nothing in files of its models, and with
# `base_model.model.` in peft's own files. The adapter's name may precede `.weight`. `down` and `up` are older names of
# A and B.
_PREFIX = r"(?:(?:base_model\.model|transformer|diffusion_model|module)\.)*"
_MODULE = re.compile(_PREFIX + r"transformer_blocks\.(\d+)\.attn1\.(to_q|to_k|to_v|to_out(?:\.0)?)")
_MATRIX = re.compile(r"(.+)\.(lora_A|lora_B|lora\.down|lora\.up|lora_down|lora_up)(?:\.(?!weight$)\w+)?\.weight")
_ALPHA = re.compile(r"(.+?)(?:\.lora_[AB])?\.alpha")


class Projection(NamedTuple):
    """A linear map that an adapter adds to; `name` is a key of `PROJECTIONS`."""

    layer: int
    name: str

    @property
    def part(self) -> int:
        """Return the number of the projection in its fused layer, from 0."""
        return PROJECTIONS[self.name][1]

    def __str__(self) -> str:
        return f"layer {self.layer} {self.name}"


class MatrixKey(NamedTuple):
    """The place of one matrix in an adapter; `matrix` is "A" or "B"."""

    projection: Projection
    matrix: str

    @property
    def sat_name(self) -> str:
        """Return the name in SwissArmyTransformer's checkpoints."""
        layer, name = self.projection
        module, number = PROJECTIONS[name]
        return f"transformer.layers.{layer}.attention.{module}.matrix_{self.matrix}.{number}"

    @property
    def diffusers_name(self) -> str:
        """Return the name in diffusers' files."""
        return f"transformer.{diffusers_module(self.projection)}.lora_{self.matrix}.weight"


def diffusers_module(projection: Projection) -> str:
    """Return the module of diffusers' transformer that computes a projection."""
    return f"transformer_blocks.{projection.layer}.attn1.{projection.name}"


def parse_sat_name(name: str) -> MatrixKey | None:
    """Return the matrix that a tensor of a SwissArmyTransformer checkpoint is; None if none."""
    if not (match := _SAT.fullmatch(name)):
        return None
    layer, module, matrix, number = match.groups()
    parts = PROJECTIONS_OF[module]
    return MatrixKey(Projection(int(layer), parts[int(number)]), matrix) if int(number) < len(parts) else None


def parse_diffusers_name(name: str) -> MatrixKey | None:
    """Return the matrix that a tensor of a diffusers or peft file is; None if not one of ours."""
    if not (match := _MATRIX.fullmatch(name)) or not (projection := parse_diffusers_module(match[1])):
        return None
    return MatrixKey(projection, "A" if match[2] in ("lora_A", "lora.down", "lora_down") else "B")


def parse_alpha_name(name: str) -> Projection | None:
    """Return the projection whose alpha a tensor of a diffusers or peft file is; None if none."""
    match = _ALPHA.fullmatch(name)
    return parse_diffusers_module(match[1]) if match else None


def parse_diffusers_module(name: str) -> Projection | None:
    """Return the projection that a module of diffusers' transformer computes; None if none."""
    match = _MODULE.fullmatch(name)
    return Projection(int(match[1]), "to_out.0" if match[2] == "to_out" else match[2]) if match else None


def base_weight(layer: int, module: str) -> str:
    """Return the name of the weight whose rows are the `PROJECTIONS_OF` a module."""
    return f"transformer.layers.{layer}.attention.{module}.weight"
