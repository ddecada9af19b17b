"""Make the data set that the `data:` section describes, or one of cached latents."""

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
    """Return the data set of a run.

    Its class is named in `data_config`, or it is a cache of `tools/precompute_latents.py`.

    Args:
        paths: locations of the data; all of the same kind.
        settings: how the data is read. A user's own class gets all arguments of the command as its `args`.
        random_start: False makes a clip's start and crop deterministic, for validation.
        repeats: how often each path is used; empty: once.
        weights: weight of each path, see `data_mixing`; empty: each clip is drawn equally often.
        argument: name of the argument for the paths, for messages.

    Raises:
        UserError: the data or its settings do not fit; see the classes.
    """
    paths = repeated(paths, repeats)
    cached = [path for path in paths if is_cache(path)]
    if cached:
        if len(cached) < len(paths):
            raise UserError(
                f"{argument}: {cached[0]} holds precomputed latents, but other data does not; name one kind only"
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
    """Return the data set of clips that the `data:` section describes; see `make_dataset`."""
    config = settings.data_config
    if "target" not in config:
        raise UserError("data: target: missing; name the class of the data set, for example data_video.SFTDataset")
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
            f"data.target: {config['target']} gives a {type(dataset).__name__}, which has no shapes of clips (bucket); "
            "derive your class from data_video.SFTDataset and change its samples"
        )
    return dataset
