"""Open the weights of a network from checkpoints of any kind, with adapters merged.

The source is a full or averaged checkpoint of SwissArmyTransformer's form, with an adapter in it or beside it; or an
adapter whose run records its base; or the pieces that DeepSpeed's ZeRO writes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from cogvideox_sat.commands.input_paths import required_input
from cogvideox_sat.configuration.yaml_reading import read_yaml, value_at
from cogvideox_sat.conversion.lora_files import read_adapter
from cogvideox_sat.conversion.lora_matrices import Adapter
from cogvideox_sat.conversion.lora_merging import MergedWeights
from cogvideox_sat.conversion.sat_lora_files import sat_adapter
from cogvideox_sat.conversion.stored_checkpoints import open_checkpoint
from cogvideox_sat.conversion.stored_weights import Stored, StoredWeights, widest_dtype
from cogvideox_sat.weights.checkpoint_files import is_adapter
from sgm.errors import UserError

logger = logging.getLogger(__name__)

CONFIG_FILE = "training_config.yaml"


@dataclass(frozen=True)
class NetworkSource:
    """Weights of a network without LoRA.

    Attributes:
        name: the weights in messages.
        config: the configuration of the run that wrote them, if it exists.
        adapters: the adapters that were added, each with its strength.
    """

    name: str
    weights: StoredWeights
    config: Path | None
    adapters: tuple[tuple[Adapter, float], ...] = ()


def open_network(
    path: Path,
    lora_load: Path | None = None,
    lora_alpha: float | None = None,
    lora_scale: float = 1.0,
    further: Sequence[tuple[Adapter, float]] = (),
) -> NetworkSource:
    """Return the weights of a network, with all adapters added.

    Args:
        path: a full checkpoint, or the checkpoint of an adapter.
        lora_load: a further adapter to add, of any kind that `conversion.lora_files.read_adapter` takes.
        lora_alpha: alpha of the adapters; None: as recorded beside them, else 1.
        lora_scale: strength of these adapters.
        further: more adapters to add, each with its own strength.

    Raises:
        UserError: the checkpoint cannot be read or holds no network, or an adapter does not fit it.
    """
    location, weights = open_checkpoint(path)
    adapters = []
    matrices = {name: weights[name].clone() for name in weights if is_adapter(name)}
    if matrices:
        adapters.append(sat_adapter(location, matrices, lora_alpha))
    config = find_config(location)
    base = weights.select(name for name in weights if not is_adapter(name))
    if not base:
        base_path = _trained_on(config)
        if base_path is None:
            raise UserError(
                f"{location} holds only an adapter; name the checkpoint of its base model, and this one as --lora_load"
            )
        logger.info("%s holds only an adapter; its run started from %s", location, base_path)
        _, weights = open_checkpoint(base_path)
        base = weights.select(name for name in weights if not is_adapter(name))
        if len(base) < len(weights):
            raise UserError(f"{base_path}, which {location} was trained on, holds an adapter itself; merge it first")
    if lora_load is not None:
        adapters.append(read_adapter(lora_load, lora_alpha))
    base = base.renamed(lambda name: name.replace(".original.", "."))
    added = [*((adapter, lora_scale) for adapter in adapters), *further]
    for adapter, strength in added:
        alpha_by_rank = next(iter(adapter.scales.values()))
        logger.info(
            "adding %s: rank %d, alpha/rank %g, times %g", adapter.source, adapter.rank, alpha_by_rank, strength
        )
    return NetworkSource(str(location), _unified(_merged(base, added)), config, tuple(added))


def find_config(location: Path) -> Path | None:
    """Return the configuration that a training run writes beside its iterations, if it exists."""
    candidates = (folder / CONFIG_FILE for folder in (location.parent, location.parent.parent))
    return next((path for path in candidates if path.is_file()), None)


def _trained_on(config: Path | None) -> Path | None:
    """Return the checkpoint that an adapter's run loaded; None if the run does not record it.

    Raises:
        UserError: the checkpoint does not exist.
    """
    if config is None:
        return None
    try:
        load = value_at(read_yaml(config), "args", "load")
    except UserError:
        return None
    return required_input(load, f"{config}: args.load") if isinstance(load, str) else None


def _merged(base: StoredWeights, adapters: list[tuple[Adapter, float]]) -> StoredWeights:
    if not adapters:
        return base
    merged = MergedWeights(base, adapters)
    entries = {
        name: Stored(entry.shape, entry.dtype, partial(_read, merged, name)) if name in merged.adapted else entry
        for name, entry in base.entries.items()
    }
    return StoredWeights(entries)


def _read(weights: MergedWeights, name: str) -> Tensor:
    return weights[name]


def _unified(weights: StoredWeights) -> StoredWeights:
    """Return the weights in their widest dtype, since trained weights may be in float32 alone."""
    dtypes = {entry.dtype for entry in weights.entries.values() if entry.dtype.is_floating_point}
    return weights.cast(widest_dtype(dtypes)) if len(dtypes) > 1 else weights
