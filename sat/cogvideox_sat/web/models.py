"""Models that the page offers, described before their weights are read.

Nothing here imports PyTorch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.request_fields import OfferedField, offered_fields
from cogvideox_sat.python_api.loading import arguments_of_model
from sgm.errors import UserError


@dataclass(frozen=True)
class OfferedModel:
    """A model, and what a request to it has.

    Args:
        name: how the page calls it.
        source: what `cogvideox_sat.load` takes: a name, a folder, or configuration files.
        settings: other arguments of `load`.
        limits: the sizes that it takes.
        fields: as `Pipeline.fields`.
    """

    name: str
    source: str | tuple[str, ...]
    settings: Mapping[str, Any]
    limits: ModelLimits
    fields: Mapping[str, OfferedField] = field(repr=False)

    @property
    def image_to_video(self) -> bool:
        return self.limits.image_to_video


def offered_models(sources: Sequence[Sequence[str]], settings: Mapping[str, Any]) -> dict[str, OfferedModel]:
    """Return the models of the page by name.

    Args:
        sources: for each model a name, a folder, or one or more configuration files.
        settings: arguments of `load` for all of them.

    Raises:
        UserError: one does not exist or has a wrong value, or two have the same name.
    """
    found: dict[str, OfferedModel] = {}
    for words in sources:
        model = offered_model(words, settings)
        if model.name in found:
            raise UserError(f"model: two are called {model.name}; name each once")
        found[model.name] = model
    return found


def offered_model(words: Sequence[str], settings: Mapping[str, Any]) -> OfferedModel:
    """Return a model of the page, see `offered_models`."""
    source: str | tuple[str, ...] = words[0] if len(words) == 1 else tuple(words)
    args, kept = arguments_of_model(source, **settings)
    with kept:
        limits = ModelLimits.from_config(args.model_config)
        sampler = (args.model_config.get("sampler_config") or {}).get("params") or {}
        usual = {
            "negative_prompt": args.negative_prompt,
            "seed": args.seed,
            "size": None if args.size_from_image else tuple(args.sampling_image_size),
            "frames": limits.video_frames(args.sampling_num_frames),
            "fps": args.sampling_fps,
            "steps": args.sampling_num_steps or sampler.get("num_steps"),
            **{name: value for name in ("guidance_scale", "guidance_schedule") if (value := getattr(args, name))},
        }
        fields = offered_fields(args.model_config, usual)
    return OfferedModel(Path(words[0]).stem or words[0], source, dict(settings), limits, fields)
