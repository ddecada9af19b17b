"""Define and check the fields of a request, from a `.jsonl` file, a program or a page.

Nothing here imports PyTorch.
"""

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cogvideox_sat.configuration.argument_limits import HIGHEST_RATE
from cogvideox_sat.configuration.model_limits import ModelLimits
from cogvideox_sat.configuration.sampler_knobs import SCHEDULES, most_steps, sampler_class, samplers_for, usual_knobs
from cogvideox_sat.latent_geometry import SPACE_FACTOR
from sgm.errors import UserError, shown
from sgm.plain_json import has_half_characters

LARGEST_SEED = 2**63 - 1
LARGEST_SCALE = 1000  # guidance scale; the released models use 6
MOST_STEPS = 2**20
MOST_WINDOWS = 1000  # windows that continue a video


@dataclass(frozen=True)
class Field:
    """A field of a request.

    Attributes:
        expected: the values that the field takes, in words.
        accepts: a test of a value.
        help: the purpose of the field.
    """

    expected: str
    accepts: Callable[[Any], bool]
    help: str


def _is_whole(value: Any, least: float, most: float = math.inf) -> bool:
    return type(value) is int and least <= value <= most  # not isinstance: bool is a subclass of int


def _is_number(value: Any, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most


def _is_pair(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(accepts, value))


def _is_interval(value: Any) -> bool:
    return _is_pair(value, lambda end: _is_number(end, 0, 1)) and value[0] < value[1]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_key_frame(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and value.keys() == {"image", "at"}
        and _is_path(value["image"])
        and _is_whole(value["at"], -math.inf)
    )


def _is_extension(value: Any) -> bool:
    is_list = isinstance(value, list | tuple) and 0 < len(value) <= MOST_WINDOWS and all(map(_is_text, value))
    return is_list or _is_whole(value, 1, MOST_WINDOWS)


FIELDS = {
    "prompt": Field("a string", _is_text, "what the video shows"),
    "negative_prompt": Field("a string", _is_text, "what guidance steers away from"),
    "image": Field("the path of an image", _is_path, "the first frame of the video"),
    "keyframes": Field(
        'a list of objects such as {"image": "last.png", "at": -1}',
        lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_key_frame, value)),
        "images that other frames of the video show",
    ),
    "video": Field("the path of a video", _is_path, "the clip that the video starts from, or continues"),
    "strength": Field("a number from 0 to 1", lambda value: _is_number(value, 0, 1), "how much of the clip is changed"),
    "extend": Field(
        f"a whole number from 1 to {MOST_WINDOWS}, or a list of prompts",
        _is_extension,
        "windows that continue the video, or their prompts",
    ),
    "seed": Field(
        "a whole number from 0 to 2^63 - 1", lambda value: _is_whole(value, 0, LARGEST_SEED), "seed of the noise"
    ),
    "num_frames": Field(
        "a positive whole number of latent frames", lambda value: _is_whole(value, 1), "length in latent frames"
    ),
    "frames": Field("a positive whole number of frames", lambda value: _is_whole(value, 1), "length in frames"),
    "size": Field(
        "[height, width] in pixels",
        lambda value: _is_pair(value, lambda side: _is_whole(side, 1)),
        "height and width in pixels",
    ),
    "fps": Field(
        f"a whole number from 1 to {HIGHEST_RATE}",
        lambda value: _is_whole(value, 1, HIGHEST_RATE),
        "frames per second of the file",
    ),
    "steps": Field("a positive whole number", lambda value: _is_whole(value, 1, MOST_STEPS), "sampling steps"),
    "sampler": Field("the name of a sampler", _is_text, "method of taking the steps"),
    "guidance_scale": Field(
        f"a number from 0 to {LARGEST_SCALE}",
        lambda value: _is_number(value, 0, LARGEST_SCALE),
        "how strongly the prompt guides",
    ),
    "guidance_interval": Field(
        "two shares of the steps such as [0.2, 0.8], the smaller one first",
        _is_interval,
        "shares of the steps between which guidance is on",
    ),
    "guidance_schedule": Field(
        f"one of {', '.join(SCHEDULES)}",
        lambda value: value in SCHEDULES,
        "how the strength of guidance changes over the steps",
    ),
}
# Fields that exclude each other.
ALTERNATIVES = (("frames", "num_frames"),)


def checked_fields(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields that are given and not None; pairs become tuples.

    Args:
        where: the beginning of messages, such as "prompts.jsonl, line 2: ".

    Raises:
        UserError: a field does not exist, `prompt` is missing, or a field does not take its value.
    """
    for name in given:
        if name not in FIELDS:
            raise UserError(f"{where}unknown key '{name}'; {nearest_field(str(name))}")
    if "prompt" not in given:
        raise UserError(f"{where}the key 'prompt' is missing")
    values = {name: value for name, value in given.items() if value is not None or name == "prompt"}
    for name, value in values.items():
        if not FIELDS[name].accepts(value):
            raise UserError(f"{where}'{name}' must be {FIELDS[name].expected}, got {_shorten(value)}")
        if isinstance(value, str) and has_half_characters(value):
            raise UserError(f"{where}'{name}' has half a character, {value!r:.60}; write the character itself")
    if "sampler" in values:
        try:
            values["sampler"] = sampler_class(values["sampler"])
        except UserError as error:
            raise UserError(f"{where}{error}") from error
    for one, other in ALTERNATIVES:
        if one in values and other in values:
            raise UserError(f"{where}'{one}' and '{other}' are both given; keep one ('{other}' counts latent frames)")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def check_argument(name: str, value: Any) -> None:
    """Check the value of an argument that has the name of a field; None is accepted.

    Raises:
        UserError: the field does not take the value.
    """
    if value is not None and not FIELDS[name].accepts(value):
        raise UserError(f"{name}: got {shown(value)}; expected {FIELDS[name].expected}")


def check_strength(strength: float | None, has_video: bool) -> None:
    """Check that a request with a `strength` has the video that it applies to.

    Raises:
        UserError: it has none.
    """
    if strength is not None and not has_video:
        raise UserError("strength: `video` is missing; give `video` too, or leave out `strength`")


def nearest_field(name: str) -> str:
    """Return the advice for a field that does not exist."""
    near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known are {', '.join(FIELDS)}"


def _shorten(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Showing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfferedField:
    """Values that a loaded model takes in a field of a request.

    Attributes:
        kind: text, image, video, key frames (images with numbers of frames), whole, number, pair (of whole numbers),
            interval (two shares) or choice.
        usual: the value if a request gives none; None: no value, or another value for each request.
        least, most, step: limits of numbers, or of both numbers of a pair (`most` for each); None: no limit.
        choices: the values that the model takes; empty: any value within the limits.
        required: a request must give a value.
    """

    name: str
    help: str
    kind: str
    usual: Any = None
    least: float | None = None
    most: float | tuple[int, int] | None = None
    step: float | None = None
    choices: Sequence[Any] = ()
    required: bool = False


def offered_fields(model_config: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, OfferedField]:
    """Return the fields of a request to a model by name, each with the values it takes.

    Fields that have no meaning for the model are left out: the image of a text-to-video model, guidance without a
    guider.

    Args:
        model_config: the `model:` section.
        usual: values of fields that a request does not give, such as `size` and `frames`.
    """
    limits, section = ModelLimits.from_config(model_config), model_config.get("sampler_config") or {}
    knobs = usual_knobs(section) | {name: value for name, value in usual.items() if value is not None}
    height, width = (SPACE_FACTOR * limit for limit in limits.largest[1:])
    side = SPACE_FACTOR * max(limits.patch[1:])
    lengths = limits.lengths()
    kinds: dict[str, dict[str, Any]] = {
        "prompt": {"kind": "text", "required": True},
        "negative_prompt": {"kind": "text"},
        "image": {"kind": "image", "required": True} if limits.image_to_video else {},
        "keyframes": {"kind": "key frames"} if limits.image_to_video else {},
        "video": {"kind": "video"},
        "strength": {"kind": "number", "least": 0, "most": 1},
        "extend": {"kind": "whole", "least": 1, "most": MOST_WINDOWS},
        "seed": {"kind": "whole", "least": 0, "most": LARGEST_SEED},
        "size": {"kind": "pair", "least": side, "most": (height, width), "step": side},
        "frames": {"kind": "choice", "choices": lengths},
        "fps": {"kind": "whole", "least": 1, "most": HIGHEST_RATE},
        "steps": {"kind": "whole", "least": 1, "most": most_steps(section)},
        "sampler": {"kind": "choice", "choices": list(samplers_for(section))},
    }
    if "guidance_scale" in knobs:
        kinds |= {
            "guidance_scale": {"kind": "number", "least": 0, "most": LARGEST_SCALE},
            "guidance_interval": {"kind": "interval", "least": 0, "most": 1},
            "guidance_schedule": {"kind": "choice", "choices": list(SCHEDULES)},
        }
    return {
        name: OfferedField(name, FIELDS[name].help, usual=knobs.get(name), **kind)
        for name, kind in kinds.items()
        if kind
    }
