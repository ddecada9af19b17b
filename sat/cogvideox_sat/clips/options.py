"""Check the options of a data set of clips before anything is read.

Size, rate and length are not among them. Nothing here imports PyTorch.
"""

from collections.abc import Callable, Mapping
from typing import Any

from cogvideox_sat.clips.captions import LABEL_LINES
from cogvideox_sat.media.video_reading import BACKENDS
from sgm.errors import UserError

# "none" means "random" in configurations written for the original.
RESHAPE_MODES = ("center", "random", "none")
# None: clips without a caption get an empty one, unless no clip of a place has a caption. "ignore": no message.
MISSING_LABELS = (None, "empty", "stop", "ignore")

Check = tuple[Callable[[Any], bool], str]


def _whole(least: int) -> Check:
    return lambda value: type(value) is int and value >= least, f"a whole number, at least {least}"


def _number(test: Callable[[float], bool], what: str) -> Check:
    return lambda value: type(value) in (int, float) and test(value), what


def _one_of(*choices: Any) -> Check:
    return lambda value: value in choices, " or ".join(str(choice) for choice in choices if choice is not None)


TEXT: Check = (lambda value: isinstance(value, str), "text")
SWITCH: Check = (lambda value: isinstance(value, bool), "true or false")
OPTIONS: dict[str, Check] = {
    "min_frames": _whole(1),
    "clips_per_video": _whole(1),
    "clip_stride": _number(lambda value: 0 < value < float("inf"), "a positive number of seconds"),
    "caption_prefix": TEXT,
    "label_lines": _one_of(*LABEL_LINES),
    "reshape_mode": _one_of(*RESHAPE_MODES),
    "horizontal_flip": _number(lambda value: 0 <= value <= 1, "a share of the clips, from 0 to 1"),
    "missing_label": _one_of(*MISSING_LABELS),
    "random_start": SWITCH,
    "txt_key": TEXT,
    "shuffle_buffer": _whole(0),
    "video_backend": _one_of(*BACKENDS),
}
# Options that a cache of latents is made with; a run cannot use the cache with other values.
KEPT_IN_CACHES = {
    **{"min_frames": None, "clips_per_video": None, "clip_stride": None, "caption_prefix": "", "label_lines": "first"},
    **{"reshape_mode": "center", "horizontal_flip": 0.0},
}


def check_options(params: Mapping[str, Any], prefix: str = "data.params.") -> None:
    """Check that the options among `params` have values that a data set takes.

    Raises:
        UserError: an option has another value.
    """
    for name, (fits, expected) in OPTIONS.items():
        value = params.get(name)
        if value is not None and not fits(value):
            raise UserError(f"{prefix}{name}: got {value!r}; expected {expected}")
    most = params.get("max_num_frames", params.get("num_frames"))
    least = params.get("min_frames")
    if least is not None and type(most) in (int, float) and least > most:
        raise UserError(
            f"{prefix}min_frames is {least}, more than max_num_frames {most}, which leaves no clip; lower it"
        )
