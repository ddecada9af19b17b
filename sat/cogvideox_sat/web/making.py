"""Conversion of the inputs of the page to the fields of a request.

Every mistake is one line that begins with the field.

Nothing here imports PyTorch, nor the library that draws the page.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from cogvideox_sat.configuration.request_fields import LARGEST_SEED, OfferedField
from cogvideox_sat.configuration.sampler_knobs import sampler_class
from cogvideox_sat.web.models import OfferedModel
from cogvideox_sat.web.shelves import Shelf
from cogvideox_sat.web.uploads import Uploads
from sgm.errors import UserError, shown

LONGEST_PROMPT = 4000  # characters; the text encoder takes some 1000
MOST_ADAPTERS = 8
MOST_KEY_FRAMES = 16
# What the page asks for, in its order. Fields of the request, but `height` and `width` for `size`, `interval_from` and
# `interval_to` for `guidance_interval`, `keyframes_at` for the numbers of `keyframes`.
TEXT_INPUTS = (
    *("model", "prompt", "negative_prompt", "height", "width", "frames", "fps", "steps", "seed", "sampler"),
    *("guidance_scale", "interval_from", "interval_to", "guidance_schedule", "adapters", "strengths"),
)
PICTURE_INPUTS = (*TEXT_INPUTS, "image", "keyframes", "keyframes_at", "video", "strength", "extend")


def request_fields(model: OfferedModel, values: Mapping[str, Any], uploads: Uploads) -> dict[str, Any]:
    """Return the fields of a request, as a call from Python has them.

    Args:
        values: what was filled in, by the names of `PICTURE_INPUTS`; None or "" for nothing. Files by their paths.
        uploads: where files may lie.

    Raises:
        UserError: a value is none of what the model takes.
    """
    given = {name: value for name, value in values.items() if value not in (None, "", [], ())}
    fields: dict[str, Any] = {"prompt": text_of(given.get("prompt", ""), "prompt")}
    if not fields["prompt"].strip():
        raise UserError("prompt: it is empty; say what the video shows")
    if "negative_prompt" in given:
        fields["negative_prompt"] = text_of(given["negative_prompt"], "negative_prompt")
    fields["seed"] = seed_of(given.get("seed"))
    offered = model.fields
    for name in ("frames", "sampler", "guidance_schedule"):
        if name in given and name in offered:
            fields[name] = choice_of(given[name], offered[name])
    for name in ("fps", "steps"):
        if name in given:
            fields[name] = whole(given[name], name, offered[name].least, offered[name].most)
    for name in ("guidance_scale", "strength"):
        if name in given and name in offered:
            fields[name] = number(given[name], name, offered[name].least, offered[name].most)
    if size := size_of(given, offered.get("size")):
        fields["size"] = size
    if "guidance_interval" in offered and (interval := interval_of(given)):
        fields["guidance_interval"] = interval
    return fields | shown_fields(model, given, uploads)


def shown_fields(model: OfferedModel, given: Mapping[str, Any], uploads: Uploads) -> dict[str, Any]:
    """Return the fields of a request that name pictures, clips and the continuation.

    Raises:
        UserError: the model takes no pictures or needs one, or a file cannot be used.
    """
    fields: dict[str, Any] = {}
    told = "image" in given or "keyframes" in given
    if told and not model.image_to_video:
        raise UserError(
            f"image: {model.name} is a text-to-video model; leave out the pictures, or choose another model"
        )
    if model.image_to_video and not told and "video" not in given:
        raise UserError(f"image: {model.name} is an image-to-video model; give a first frame, a key frame or a clip")
    for name in ("image", "video"):
        if name in given:
            fields[name] = str(uploads.file(given[name]))
    if "keyframes" in given:
        fields["keyframes"] = key_frames_of(given["keyframes"], given.get("keyframes_at", ""), uploads)
    if "strength" in given and "video" not in given:
        raise UserError("strength: it says how much of a clip is changed; give a clip too, or leave it empty")
    if "extend" in given:
        fields["extend"] = extension_of(given["extend"], model.fields["extend"])
    return fields


def text_of(value: object, name: str) -> str:
    """Return a text of bearable length.

    Raises:
        UserError: it is none, or too long.
    """
    if not isinstance(value, str):
        raise UserError(f"{name}: got {shown(value)}; give a text")
    if len(value) > LONGEST_PROMPT:
        raise UserError(f"{name}: it has {len(value)} characters; {LONGEST_PROMPT} are the most")
    return " ".join(value.split())


def seed_of(value: object) -> int:
    """Return a seed; a new one where nothing is given.

    Raises:
        UserError: it is no seed.
    """
    if value is None:
        return secrets.randbelow(2**32)
    return whole(value, "seed", 0, LARGEST_SEED)


def whole(value: object, name: str, least: float | None, most: Any) -> int:
    """Return a whole number within bounds, from a number or a text.

    Raises:
        UserError: it is none.
    """
    found = None
    if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
        found = int(value) if len(value.strip()) < 30 else None
    elif isinstance(value, int) and not isinstance(value, bool):
        found = value
    elif isinstance(value, float) and value.is_integer():
        found = int(value)
    return int(bounded(found, value, name, "a whole number", least, most))


def number(value: object, name: str, least: float | None, most: Any) -> float:
    """Return a number within bounds, from a number or a text.

    Raises:
        UserError: it is none.
    """
    found = None
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            found = float(value)
        except ValueError:
            found = None
    return bounded(found, value, name, "a number", least, most)


def bounded(found: Any, value: object, name: str, kind: str, least: float | None, most: float | None) -> Any:
    """Return a number that was found; raises UserError unless there is one, within the bounds."""
    is_low = found is not None and least is not None and found < least
    is_high = found is not None and most is not None and found > most
    if found is None or not math.isfinite(found) or is_low or is_high:
        bounds = f" from {plain(least)} to {plain(most)}" if least is not None and most is not None else ""
        raise UserError(f"{name}: got {shown(value)}; expected {kind}{bounds}")
    return found


def plain(bound: float) -> str:
    """Return a bound with all of its digits: 9223372036854775807, 10, 0.5."""
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"


def choice_of(value: object, offered: OfferedField) -> Any:
    """Return one of the values that a field offers; raises UserError for another one."""
    found = next((choice for choice in offered.choices if str(choice) == str(value)), None)
    if found is None:
        raise UserError(f"{offered.name}: got {shown(value)}; it can be {', '.join(map(str, offered.choices))}")
    return found


def size_of(given: Mapping[str, Any], offered: OfferedField | None) -> tuple[int, int] | None:
    """Return (height, width) in pixels; None: neither is given.

    Raises:
        UserError: one alone is given, or the model makes no videos of such a size.
    """
    if offered is None or not {"height", "width"} & given.keys():
        return None
    most: Any = offered.most or (None, None)
    sides = []
    for name, limit in zip(("height", "width"), most, strict=True):
        side = whole(given.get(name), name, offered.least, limit)
        if offered.step and side % int(offered.step):
            raise UserError(f"{name}: got {side}; expected a multiple of {offered.step:g}")
        sides.append(side)
    return sides[0], sides[1]


def interval_of(given: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return from which share of the steps to which there is guidance; None: during all.

    Raises:
        UserError: these are no two shares of which the first is smaller.
    """
    if not {"interval_from", "interval_to"} & given.keys():
        return None
    first = number(given.get("interval_from", 0), "guidance_interval", 0, 1)
    last = number(given.get("interval_to", 1), "guidance_interval", 0, 1)
    if first >= last:
        raise UserError(f"guidance_interval is {first:g} to {last:g}; its end must be larger than its begin")
    return None if (first, last) == (0, 1) else (first, last)


def key_frames_of(files: object, at: object, uploads: Uploads) -> list[dict[str, Any]]:
    """Return the key frames of a request.

    Args:
        files: the pictures.
        at: the numbers of their frames, in the same order, with commas between them.

    Raises:
        UserError: these are not as many numbers as pictures.
    """
    pictures = list(files) if isinstance(files, list | tuple) else [files]
    words = [word for word in text_of(at, "keyframes").replace(",", " ").split() if word]
    if len(pictures) > MOST_KEY_FRAMES:
        raise UserError(f"keyframes: {len(pictures)} pictures; {MOST_KEY_FRAMES} are the most")
    if len(words) != len(pictures):
        raise UserError(
            f"keyframes: {len(pictures)} pictures and {len(words)} numbers of frames; give a number for each, "
            "such as 4, -1 (the last frame)"
        )
    places = [whole(word, "keyframes", None, None) for word in words]
    return [{"image": str(uploads.file(file)), "at": place} for file, place in zip(pictures, places, strict=True)]


def extension_of(value: object, offered: OfferedField) -> int | list[str]:
    """Return by how many windows a video goes on, or their prompts, one a line.

    Raises:
        UserError: there are too many.
    """
    text = str(value).strip()
    if isinstance(value, int | float) or text.lstrip("+-").replace(".", "", 1).isdecimal():
        return whole(value if not isinstance(value, str) else text, "extend", offered.least, offered.most)
    prompts = [text_of(line, "extend") for line in text.splitlines() if line.strip()]
    most = int(offered.most) if isinstance(offered.most, int | float) else len(prompts)
    if len(prompts) > most:
        raise UserError(f"extend: {len(prompts)} prompts; {most} are the most")
    return prompts


def adapters_of(names: object, strengths: object, shelf: Shelf) -> dict[str, float]:
    """Return the paths of adapters with their strengths.

    Args:
        names: those that were chosen.
        strengths: of these in their order, with commas between them; empty: 1 for each.

    Raises:
        UserError: one does not exist, or these are not as many strengths as adapters.
    """
    chosen = list(names) if isinstance(names, list | tuple) else [names] if names else []
    if len(chosen) > MOST_ADAPTERS:
        raise UserError(f"adapters: {len(chosen)} are chosen; {MOST_ADAPTERS} are the most")
    words = str(strengths if strengths is not None else "").replace(",", " ").split()
    if words and len(words) != len(chosen):
        raise UserError(f"adapters: {len(chosen)} adapters and {len(words)} strengths; give a strength for each")
    values = [number(word, "adapters", -10, 10) for word in words] or [1.0] * len(chosen)
    return {str(shelf.path(name)): value for name, value in zip(chosen, values, strict=True)}


def filled_in(
    fields: Mapping[str, Any], adapters: Mapping[str, float], model: OfferedModel, shelf: Shelf, names: Sequence[str]
) -> dict[str, Any]:
    """Return the values of the inputs that make a video again, by the inputs' names.

    An input that the request leaves open has the value None.

    Args:
        fields: of its request, see `gallery.Entry`; adapters: paths with strengths.
        names: of the inputs.
    """
    values: dict[str, Any] = dict.fromkeys(names)
    values.update({name: value for name, value in fields.items() if name in values and name not in ("keyframes",)})
    values["model"] = model.name
    values["seed"] = str(fields["seed"]) if "seed" in fields else ""
    if size := fields.get("size"):
        values["height"], values["width"] = size
    if "num_frames" in fields:
        values["frames"] = model.limits.video_frames(fields["num_frames"])
    for name in ("sampler", "frames", "guidance_schedule"):
        values[name] = offered_choice(values.get(name), model.fields.get(name))
    values["interval_from"], values["interval_to"] = fields.get("guidance_interval") or (None, None)
    there = {str(shelf.path(name)): name for name in shelf.names()}
    kept = {there[path]: strength for path, strength in adapters.items() if path in there}
    values["adapters"], values["strengths"] = list(kept), ", ".join(f"{strength:g}" for strength in kept.values())
    if entries := fields.get("keyframes"):
        values["keyframes"] = [entry["image"] for entry in entries]
        values["keyframes_at"] = ", ".join(str(entry["at"]) for entry in entries)
    if isinstance(extend := fields.get("extend"), list | tuple):
        values["extend"] = "\n".join(extend)
    return {name: values.get(name) for name in names}


def offered_choice(value: Any, offered: OfferedField | None) -> Any:
    """Return a value of a record as a field offers it; None if it does not.

    A record names the class of a sampler.
    """
    choices = offered.choices if offered is not None else ()
    if offered is not None and offered.name == "sampler":
        return next((choice for choice in choices if value in (choice, sampler_class(choice))), None)
    return value if value in choices else None


def model_for(fields: Mapping[str, Any], models: Mapping[str, OfferedModel], usual: str) -> OfferedModel:
    """Return a model that takes such fields: the usual one if it does."""
    told = "image" in fields or "keyframes" in fields
    ordered = [models[usual], *models.values()]
    return next((model for model in ordered if model.image_to_video == told), models[usual])
