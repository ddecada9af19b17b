"""Read LoRA adapters in SwissArmyTransformer's checkpoints."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from cogvideox_sat.configuration.yaml_reading import read_yaml, value_at
from cogvideox_sat.conversion.lora_matrices import Adapter, check_matrices
from cogvideox_sat.conversion.lora_names import (
    PROJECTIONS,
    MatrixKey,
    Projection,
    parse_sat_name,
)
from cogvideox_sat.conversion.stored_checkpoints import open_checkpoint
from cogvideox_sat.weights.checkpoint_files import is_adapter
from sgm.errors import UserError, some

logger = logging.getLogger(__name__)

# Names of an adapter's configuration: as a training run saves it, and as tools/import_hf_lora.py writes it.
CONFIG_FILES = ("training_config.yaml", "lora.yaml")
DEFAULT_ALPHA = 1.0  # SwissArmyTransformer's


def read_sat_adapter(path: str | Path, alpha: float | None = None) -> Adapter:
    """Return the adapter in a checkpoint, see `open_checkpoint`, with or without base weights.

    Args:
        alpha: that of the configuration that the adapter was trained with; None: as `recorded_alpha` finds it, else 1.

    Raises:
        UserError: the checkpoint holds no adapter, or its matrices do not fit together.
    """
    file, weights = open_checkpoint(Path(path))
    return sat_adapter(file, weights, alpha)


def sat_adapter(file: Path, weights: Mapping[str, Tensor], alpha: float | None = None) -> Adapter:
    """Return the adapter among weights that were read from `file`; see `read_sat_adapter`.

    Raises:
        UserError: the weights hold no adapter, or its matrices do not fit together.
    """
    found = {name: weights[name] for name in weights if is_adapter(name)}
    if not found:
        raise UserError(f"{file} holds no adapter (no matrix_A or matrix_B); name a checkpoint of training with LoRA")
    keys = {name: key for name in found if (key := parse_sat_name(name)) is not None}
    if foreign := [name for name in found if name not in keys]:
        raise UserError(f"{file}: its adapter is on modules that CogVideoX does not have: {some(foreign)}")
    matrices = {keys[name]: tensor for name, tensor in found.items()}
    rank, width = check_matrices(file, matrices)
    for layer in {key.projection.layer for key in matrices}:
        for name in PROJECTIONS:
            if MatrixKey(Projection(layer, name), "A") not in matrices:
                raise UserError(f"{file}: its adapter is incomplete: layer {layer} has no {name}; copy the whole file")
    if alpha is None:
        alpha = recorded_alpha(file, rank)
    return Adapter(file, rank, width, matrices, {key.projection: alpha / rank for key in matrices})


def recorded_alpha(file: Path, rank: int) -> float:
    """Return the alpha in the configuration beside a checkpoint's folder; 1 if there is none.

    Raises:
        UserError: the configuration is of an adapter of another rank, or cannot be read.
    """
    candidates = [folder / name for folder in (file.parent, file.parent.parent) for name in CONFIG_FILES]
    config_file = next((path for path in candidates if path.is_file()), None)
    if config_file is None:
        logger.info("%s: no training_config.yaml beside it, so alpha is assumed to be %g", file, DEFAULT_ALPHA)
        return DEFAULT_ALPHA
    try:
        config = read_yaml(config_file, "the configuration beside the adapter,")
    except UserError as error:
        raise UserError(f"cannot read {config_file} ({error}); give --lora_alpha instead") from error
    params = value_at(config, "model", "network_config", "params", "modules", "lora_config", "params")
    params = params if isinstance(params, dict) else {}
    if params.get("r", rank) != rank:
        raise UserError(
            f"{config_file} is of an adapter of rank {params['r']}, but {file} has rank {rank}; give --lora_alpha"
        )
    alpha = params.get("lora_alpha", DEFAULT_ALPHA)
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise UserError(f"{config_file}: lora_alpha: got {alpha!r}; expected a positive number")
    return float(alpha)
