"""Read LoRA adapters in the files of diffusers and peft."""

import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cogvideox_sat.conversion.lora_matrices import Adapter, check_matrices
from cogvideox_sat.conversion.lora_names import (
    LORA_FILE,
    PROJECTIONS,
    MatrixKey,
    Projection,
    diffusers_module,
    parse_alpha_name,
    parse_diffusers_name,
)
from cogvideox_sat.files.refusals import refusal
from sgm.errors import UserError, shown, some
from sgm.plain_json import parse_json
from sgm.weights import read_state_dict

logger = logging.getLogger(__name__)

LORA_FILES = (LORA_FILE, "adapter_model.safetensors")  # diffusers' name, peft's name
METADATA_KEY = "lora_adapter_metadata"  # diffusers' key in the header of a safetensors file
_NAME_PATTERN = re.compile(r"\^?(\w|\\?\.)+\$?")


def read_diffusers_adapter(path: str | Path, alpha: float | None = None) -> Adapter:
    """Return the adapter in a safetensors file of diffusers or peft, or in a folder with one.

    Alpha is looked for in the header, in tensors named `….alpha` and in peft's adapter_config.json beside the file.
    Without any of these it equals the rank, as in diffusers. If a layer lacks some projections, these get matrices of
    zeros, which add nothing.

    Args:
        alpha: that of all projections, overriding the file.

    Raises:
        UserError: the file cannot be read, or adapts modules that SwissArmyTransformer's adapters do not.
    """
    file = diffusers_file(Path(path))
    weights = lora_tensors(file)
    matrices: dict[MatrixKey, Tensor] = {}
    alphas: dict[Projection, float] = {}
    foreign: list[str] = []
    for name, tensor in weights.items():
        if key := parse_diffusers_name(name):
            if key in matrices:
                raise UserError(f"{file} holds {key.projection} twice, under {name} and another name; keep one")
            matrices[key] = tensor
        elif (projection := parse_alpha_name(name)) and tensor.numel() == 1:
            alphas[projection] = float(tensor)
        else:
            foreign.append(name)
    if foreign:
        raise UserError(f"{file}: {_why_foreign(foreign)}")
    if not matrices:
        raise UserError(f"{file} holds no LoRA matrices; name a LoRA file of diffusers or peft")
    rank, width = check_matrices(file, matrices)
    scales = _scales(file, {key.projection for key in matrices}, rank, alphas, alpha)
    _fill_with_zeros(file, matrices, scales)
    return Adapter(file, rank, width, matrices, scales)


def lora_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors in a LoRA file by name.

    Raises:
        UserError: the file cannot be read, or holds more than named tensors.
    """
    weights = read_state_dict(file)
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    ):
        raise UserError(f"{file} is not a LoRA file, it holds more than named tensors; name a LoRA file")
    return dict(weights)


def diffusers_file(path: Path) -> Path:
    """Return the file that `path` stands for: itself, or the only LoRA file in a folder.

    Raises:
        UserError: there is no such file, or more than one.
    """
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"LoRA file {path} does not exist")
        return path
    for name in LORA_FILES:
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"{path} holds {len(files)} safetensors files, expected one LoRA file; name the file itself")
    return files[0]


def adapter_metadata(file: Path) -> dict[str, Any] | None:
    """Return a file's metadata about its adapter in peft's terms (`r`, `lora_alpha`), or None.

    Raises:
        UserError: the metadata cannot be read or parsed.
    """
    where, text = file, None
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as content:  # the caller has checked that the file is complete
            text = (content.metadata() or {}).get(METADATA_KEY)
    if text is None and (beside := file.with_name("adapter_config.json")).is_file():
        where = beside
        try:
            text = beside.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"cannot read {beside}, which holds the adapter's alpha: {refusal(error)}") from error
    if text is None:
        return None
    try:
        metadata = parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: the description of the adapter is not valid JSON: {error}; download the file again"
        ) from error
    if not isinstance(metadata, dict):
        raise UserError(f"{where}: the description of the adapter is not a JSON object; download the file again")
    return {key.removeprefix("transformer."): value for key, value in metadata.items()}


def _scales(
    file: Path, projections: Iterable[Projection], rank: int, alphas: Mapping[Projection, float], given: float | None
) -> dict[Projection, float]:
    """Return alpha/rank of each projection, or alpha/√rank for rank-stabilised LoRA."""
    metadata = adapter_metadata(file) or {}
    for key in ("use_dora", "lora_bias"):
        if metadata.get(key):
            raise UserError(f"{file}: {key} is on, which adapters here do not support; name one trained without it")
    divisor = math.sqrt(rank) if metadata.get("use_rslora") else rank
    general = metadata.get("lora_alpha")
    patterns = metadata.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise UserError(f"{file}: alpha_pattern: got {shown(patterns)}; expected a number for each name of a module")
    if given is None and (odd := [pattern for pattern in patterns if not _NAME_PATTERN.fullmatch(pattern)]):
        raise UserError(f"{file}: alpha_pattern holds {odd[0]!r}, expected names of modules; give --file_alpha")
    if given is None and general is None and not alphas:
        logger.warning("%s does not hold alpha; it is assumed to be the rank, %d, as in diffusers", file, rank)
    scales = {}
    for projection in projections:
        if given is not None:
            alpha = given
        else:
            alpha = alphas.get(projection, _matching(patterns, projection, rank if general is None else general))
        if type(alpha) not in (int, float) or not 0 < alpha <= sys.float_info.max:
            raise UserError(f"{file}: alpha of {projection}: got {shown(alpha)}; expected a positive number")
        scales[projection] = alpha / divisor
    return scales


def _matching(patterns: Mapping[str, Any], projection: Projection, otherwise: Any) -> Any:
    """Return the value of the pattern that names a module or the end of its name.

    peft takes the patterns as regular expressions, but files hold names.
    """
    name = diffusers_module(projection)
    for pattern, value in patterns.items():
        end = pattern.removeprefix("^").removeprefix("transformer.").removesuffix("$").replace("\\.", ".")
        if name == end or name.endswith("." + end):
            return value
    return otherwise


def _fill_with_zeros(file: Path, matrices: dict[MatrixKey, Tensor], scales: dict[Projection, float]) -> None:
    added = []
    for layer in sorted({projection.layer for projection in scales}):
        present = next(key for key in matrices if key.projection.layer == layer and key.matrix == "A")
        a, b = matrices[present], matrices[MatrixKey(present.projection, "B")]
        for name in PROJECTIONS:
            projection = Projection(layer, name)
            if projection not in scales:
                matrices[MatrixKey(projection, "A")], matrices[MatrixKey(projection, "B")] = (
                    a.new_zeros(a.shape),
                    b.new_zeros(b.shape),
                )
                scales[projection] = scales[present.projection]
                added.append(str(projection))
    if added:
        logger.info("%s does not adapt %s; they get zeros, which add nothing", file, some(added, 4))


def _why_foreign(names: list[str]) -> str:
    """Return the reason, in one line, why our adapters cannot hold these tensors."""
    modules = {name.split(".lora")[0].removesuffix(".alpha") for name in names}
    kinds = sorted({re.sub(r".*transformer_blocks\.\d+\.", "", module) for module in modules})
    if any("dora" in name or "magnitude" in name for name in names):
        reason = "it is a DoRA"
    elif all(name.endswith(".bias") for name in names):
        reason = "it has biases"
    else:
        reason = f"it adapts {some(kinds)}"
    return f"{reason}; adapters here hold only plain LoRA on attn1.to_q, to_k, to_v and to_out"
