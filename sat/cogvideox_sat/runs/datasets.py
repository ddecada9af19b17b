"""Make the dataset that the `data:` section of a configuration describes, or one of latents that were cached."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from cogvideox_sat.clips.latent_cache import is_cache
from cogvideox_sat.clips.latent_dataset import LatentDataset
from cogvideox_sat.clips.selection import UnusablePlace
from cogvideox_sat.clips.transforms import Framing
from cogvideox_sat.configuration.data_mixing import draws_of, repeated
from cogvideox_sat.configuration.settings import DataSettings
from data_video import SFTDataset
from sgm.config_places import Place
from sgm.errors import UserError
from sgm.util import class_at, reporting


def make_dataset(
    paths: Sequence[str],
    settings: DataSettings,
    random_start: bool = True,
    *,
    repeats: Sequence[int] = (),
    weights: Sequence[float] = (),
    argument: str = "train_data",
) -> Dataset:
    """Return the dataset of a run: of the class that `data_config` names, or what `tools/precompute_latents.py` made.

    Args:
        paths: where the data is; all of the same kind.
        settings: how it is read. A class of the user's own gets as its `args` all arguments of the command.
        random_start: False takes nothing of a clip by chance, for validation: neither its start nor its crop.
        repeats: how often each of the paths comes; empty: once.
        weights: of each of the paths, see `data_mixing`; empty: a path has as many samples as it has clips.
        argument: that names the paths, for messages.

    Raises:
        UserError: the data or its settings do not fit; see the classes.
    """
    paths = repeated(paths, repeats)
    cached = [path for path in paths if is_cache(path)]
    if cached:
        if len(cached) < len(paths):
            raise UserError(
                f"{cached[0]} holds precomputed latents and other data does not: train on one kind at a time"
            )
        dataset: Any = LatentDataset(paths, settings.model_config, settings.data_config)
    else:
        dataset = _clips(paths, settings, argument)
        if not random_start:
            dataset.random_start = False
            dataset.framing = Framing()
    if weights:
        counts = getattr(dataset, "counts", ())
        if len(counts) != len(weights):
            raise UserError(
                f"train_data_weights: {settings.data_config['target']} does not tell its places apart; remove the "
                "weights"
            )
        dataset.draws = draws_of(counts, weights)
    return dataset


def _clips(paths: Sequence[str], settings: DataSettings, argument: str) -> Any:
    """Return the dataset of clips that the `data:` section describes; see `make_dataset`."""
    config = settings.data_config
    if "target" not in config:
        raise UserError("data: target is missing; name the class of the dataset, data_video.SFTDataset for instance")
    place = Place(("data",), config, settings.sources, building=True)
    kind: Any = class_at(config["target"], place.below("target"), "data")
    create, ours = kind.create_dataset_function, inspect.getattr_static(SFTDataset, "create_dataset_function")
    args = settings if getattr(create, "__func__", None) is ours.__func__ else settings.as_args()
    try:
        with reporting(place, Place((), None)):
            dataset = create(list(paths), args, **(config.get("params") or {}))
    except UnusablePlace as error:
        raise UserError(f"{argument}: {error}") from error
    if not hasattr(dataset, "bucket"):
        raise UserError(
            f"data.target: {config['target']} gives a {type(dataset).__name__}, which does not tell shapes of clips "
            "(bucket); derive your class from data_video.SFTDataset and change what it gives"
        )
    return dataset
