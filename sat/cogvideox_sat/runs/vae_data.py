"""The clips that a VAE is trained on: those of fine-tuning, without captions, as long as the VAE takes them."""

from argparse import Namespace
from typing import Any

from torch.utils.data import Dataset

from cogvideox_sat.configuration.argument_lists import VaeTrainingArguments
from data_video import make_dataset


def open_data(
    args: VaeTrainingArguments,
    time_factor: int,
    paths: list[str],
    random_start: bool = True,
    max_unreadable_share: float | None = None,
    **mixing: Any,
) -> Dataset:
    """Return the clips of `paths`.

    Args:
        time_factor: clips have `time_factor * k + 1` frames.
        random_start: see `data_video.make_dataset`.
        max_unreadable_share: if not that of the arguments.
        mixing: the repeats, weights and name of the argument that `make_dataset` takes.
    """
    config = dict(args.data_config)
    config["params"] = {"frame_multiple": time_factor, **(config.get("params") or {})}
    share = args.max_unreadable_share if max_unreadable_share is None else max_unreadable_share
    settings = Namespace(missing_label="ignore", max_unreadable_share=share, clip_timeout=args.clip_timeout)
    return make_dataset(paths, config, settings, random_start, **mixing)
