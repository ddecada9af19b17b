"""The network's weights out of whatever holds them, as those of a network without LoRA.

That is a checkpoint of SwissArmyTransformer's form, full or averaged, with an adapter in it or beside it, or an
adapter alone whose run says what it was trained on, or the pieces that DeepSpeed's ZeRO leaves.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cogvideox_sat.commands.input_paths import required_input
from cogvideox_sat.configuration.yaml_reading import read_yaml
from cogvideox_sat.conversion.lora_files import Adapter, read_adapter, sat_adapter
from cogvideox_sat.conversion.lora_merging import MergedWeights
from cogvideox_sat.conversion.stored_checkpoints import open_checkpoint
from cogvideox_sat.conversion.stored_weights import Stored, StoredWeights
from cogvideox_sat.weights.checkpoint_files import is_adapter
from sgm.errors import UserError

logger = logging.getLogger(__name__)

CONFIG_FILE = "training_config.yaml"


@dataclass(frozen=True)
class NetworkSource:
    """
    Args:
        name: names the weights in messages.
        config: the configuration of the run that left them, if it is there.
        adapters: those that were added to them, each with its strength.
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
    """
    Args:
        path: a full checkpoint, or that of an adapter.
        lora_load: a further adapter to add, of any kind that `conversion.lora_files.read_adapter` takes.
        lora_alpha: of the adapters; None: as recorded beside them, else 1.
        lora_scale: how strongly adapters apply.
        further: adapters to add beside these, each with a strength of its own.

    Raises:
        UserError: it cannot be read, holds no network, or the adapters do not fit it.
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
                f"{location} holds an adapter alone: name the checkpoint of its base model, and this one as --lora_load"
            )
        logger.info("%s holds an adapter alone; its run started from %s", location, base_path)
        _, weights = open_checkpoint(base_path)
        base = weights.select(name for name in weights if not is_adapter(name))
        if len(base) < len(weights):
            raise UserError(f"{base_path}, which {location} was trained on, holds an adapter itself: merge it first")
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
    """The configuration that a training run writes beside the folders of its iterations."""
    candidates = (folder / CONFIG_FILE for folder in (location.parent, location.parent.parent))
    return next((path for path in candidates if path.is_file()), None)


def _trained_on(config: Path | None) -> Path | None:
    """Return what a run that trained an adapter loaded, None if nothing tells it.

    Raises:
        UserError: it does not exist.
    """
    if config is None:
        return None
    try:
        load = read_yaml(config)["args"]["load"]
    except (UserError, KeyError, TypeError):
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
    """All in one dtype: trained weights may be in float32 beside others that are not."""
    dtypes = {entry.dtype for entry in weights.entries.values() if entry.dtype.is_floating_point}
    widest = None
    for dtype in dtypes:
        widest = dtype if widest is None else torch.promote_types(widest, dtype)
    return weights.cast(widest) if len(dtypes) > 1 else weights
