"""Choose the engine of a command: ours, or a user's own subclass.

The subclass is given from Python, or as `model.target`.
"""

import inspect

import torch

from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.parallel.video_groups import ALONE, VideoGroups
from diffusion_video import SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.util import get_obj_from_str

OWN = f"{SATVideoDiffusionEngine.__module__}.{SATVideoDiffusionEngine.__name__}"


def engine_class(settings: EngineSettings) -> type[SATVideoDiffusionEngine]:
    """Return the class in `model_cls`, or else in `model.target`; ours by default.

    Raises:
        UserError: the class is not a subclass of ours, or takes other arguments.
    """
    target = settings.model_config.get("target")
    chosen, name = settings.model_cls, "model_cls"
    if (chosen is None or chosen is SATVideoDiffusionEngine) and target is not None:
        if not isinstance(target, str):
            raise UserError(f"model.target: got {target!r}; expected the import path of an engine, such as {OWN}")
        chosen, name = get_obj_from_str(target), f"model.target: {target}"
    if chosen is None:
        return SATVideoDiffusionEngine
    if not (isinstance(chosen, type) and issubclass(chosen, SATVideoDiffusionEngine)):
        raise UserError(
            f"{name}: {getattr(chosen, '__name__', chosen)} is not a subclass of {OWN}; derive it from that class"
        )
    try:
        inspect.signature(chosen).bind(settings, parts=(), device="cpu")
    except TypeError as error:
        raise UserError(f"{name}: its __init__ must take (args, **kwargs) and pass both on: {error}") from error
    return chosen


def build_engine(
    settings: EngineSettings,
    parts: tuple[str, ...],
    device: torch.device | str,
    groups: VideoGroups = ALONE,
) -> SATVideoDiffusionEngine:
    """Return the engine of a command, with some of its parts built on `device`.

    A user's own class gets all arguments of the command as its `args`, as in the original.

    Args:
        groups: the processes that make a video together.

    Raises:
        UserError: see `engine_class`; or its `__init__` does not pass `parts` and `device` on, or the engine cannot
            share videos in this way.
    """
    chosen = engine_class(settings)
    args = settings if chosen is SATVideoDiffusionEngine else settings.as_args()
    engine = chosen(args, parts=(), device=device)
    if engine.device != torch.device(device):
        raise UserError(
            f"{chosen.__module__}.{chosen.__name__}: its __init__ must pass its keywords on: "
            "super().__init__(args, **kwargs)"
        )
    engine.share_videos(groups)
    for part in parts:
        engine.build(part)
    return engine


def is_overridden(engine: SATVideoDiffusionEngine, method: str) -> bool:
    """Return whether the engine's class overrides a method of ours."""
    return getattr(type(engine), method) is not getattr(SATVideoDiffusionEngine, method)
