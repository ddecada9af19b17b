"""Choose the engine that a command runs: ours, or a subclass of the user's own, from Python or by `model.target`."""

import inspect

import torch

from cogvideox_sat.configuration.settings import EngineSettings
from cogvideox_sat.parallel.video_groups import ALONE, VideoGroups
from diffusion_video import SATVideoDiffusionEngine
from sgm.errors import UserError
from sgm.util import get_obj_from_str

OWN = f"{SATVideoDiffusionEngine.__module__}.{SATVideoDiffusionEngine.__name__}"


def engine_class(settings: EngineSettings) -> type[SATVideoDiffusionEngine]:
    """Return the class that `model_cls` or else `model.target` of the configuration names, ours by default.

    Raises:
        UserError: the class is no subclass of ours, or takes other arguments.
    """
    target = settings.model_config.get("target")
    chosen, name = settings.model_cls, "model_cls"
    if (chosen is None or chosen is SATVideoDiffusionEngine) and target is not None:
        if not isinstance(target, str):
            raise UserError(f"model.target is {target!r}; expected the import path of an engine, such as {OWN}")
        chosen, name = get_obj_from_str(target), f"model.target: {target}"
    if chosen is None:
        return SATVideoDiffusionEngine
    if not (isinstance(chosen, type) and issubclass(chosen, SATVideoDiffusionEngine)):
        raise UserError(
            f"{name}: {getattr(chosen, '__name__', chosen)} is no subclass of {OWN}; derive it from that class"
        )
    try:
        inspect.signature(chosen).bind(settings, parts=(), device="cpu")
    except TypeError as error:
        raise UserError(f"{name}: its __init__ must take (args, **kwargs) and hand both on: {error}") from error
    return chosen


def build_engine(
    settings: EngineSettings,
    parts: tuple[str, ...],
    device: torch.device | str,
    groups: VideoGroups = ALONE,
) -> SATVideoDiffusionEngine:
    """Return the engine of a command, with `parts` of it built on `device`.

    A class of the user's own gets as its `args` all arguments of the command, as in the original.

    Args:
        groups: the processes that make a video together.

    Raises:
        UserError: see `engine_class`; its `__init__` does not hand `parts` and `device` on; the engine cannot share
            videos so.
    """
    chosen = engine_class(settings)
    args = settings if chosen is SATVideoDiffusionEngine else settings.as_args()
    engine = chosen(args, parts=(), device=device)
    if engine.device != torch.device(device):
        raise UserError(
            f"{chosen.__module__}.{chosen.__name__}: its __init__ must hand its keywords on: "
            "super().__init__(args, **kwargs)"
        )
    engine.share_videos(groups)
    for part in parts:
        engine.build(part)
    return engine


def is_overridden(engine: SATVideoDiffusionEngine, method: str) -> bool:
    """Return whether the engine's class has a method of its own in the place of ours."""
    return getattr(type(engine), method) is not getattr(SATVideoDiffusionEngine, method)
