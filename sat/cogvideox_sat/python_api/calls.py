"""Turn the arguments of a call into requests for one or several prompts.

Each field is given once for all prompts, or once per prompt. This module imports no PyTorch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from cogvideox_sat.configuration.request_fields import FIELDS, checked_fields, nearest_field
from cogvideox_sat.sampling.prompt_lines import found_files
from cogvideox_sat.sampling.prompt_requests import PromptRequest
from sgm.errors import UserError, shown

IN_MEMORY = "in memory"  # replaces a picture or clip that is not a file while fields are checked
SHOWN = ("image", "video", "keyframes")  # fields that may hold pictures and clips in memory
LISTS = ("size", "guidance_interval", "keyframes", "extend")  # fields for which one value may be a list


@dataclass(frozen=True)
class InMemory:
    """The pictures and the clip of a request that are not files.

    Args:
        image: the first frame.
        video: the clip; the request then names a clip called `IN_MEMORY`.
        keyframes: pictures, each with the number of its frame.
    """

    image: Any = None
    video: Any = None
    keyframes: tuple[tuple[Any, int], ...] = ()


def requests_of(
    prompt: Any, given: Mapping[str, Any], image_to_video: bool
) -> tuple[list[tuple[PromptRequest, InMemory]], bool]:
    """Return the requests of a call, and whether the call returns a list.

    Each request comes with its pictures and clip that are not files.

    Args:
        prompt: a prompt or a list of prompts; each is a text, or a mapping with the fields of a line of a `.jsonl`
            file.
        given: the other fields, each one value for all prompts, or a list with one value per prompt.
        image_to_video: whether the model takes images.

    Raises:
        UserError: a field does not exist or has an invalid value, or a list has the wrong length.
    """
    several = isinstance(prompt, list | tuple)
    prompts = list(prompt) if several else [prompt]
    if not prompts:
        raise UserError("prompt: the list is empty; give at least one prompt")
    for name in given:
        if name not in FIELDS:
            raise UserError(f"unknown key '{name}'; {nearest_field(name)}")
    fields = {name: spread(name, value, len(prompts) if several else None) for name, value in given.items()}
    found = []
    for index, each in enumerate(prompts):
        where = f"prompt {index + 1}: " if several else ""
        own = dict(each) if isinstance(each, Mapping) else {"prompt": each}
        others = {name: values[index] for name, values in fields.items() if values[index] is not None}
        found.append(request_of({**others, **own}, index, where, image_to_video))
    return found, several


def spread(name: str, value: Any, count: int | None) -> list[Any]:
    """Return the value of a field for each prompt.

    Args:
        value: one value, or a list with one value per prompt.
        count: number of prompts in a list; None: one prompt, not in a list.

    Raises:
        UserError: the value is a list of another length.
    """
    is_list = isinstance(value, list | tuple)
    if name in LISTS and is_list and value:  # a list of lists holds one value per prompt; other lists are one value
        is_list = isinstance(value[0], list | tuple | NoneType) or (name == "extend" and isinstance(value[0], int))
    if count is None or not is_list:
        return [value] * (count or 1)
    if len(value) != count:
        raise UserError(f"{name}: got {len(value)} values for {count} prompts; give one value, or one per prompt")
    return list(value)


def plain(value: Any) -> Any:
    """Return a value with numbers of NumPy and PyTorch converted to Python's numbers."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def request_of(fields: dict[str, Any], index: int, where: str, image_to_video: bool) -> tuple[PromptRequest, InMemory]:
    """Return a request, and its pictures and clip that are not files.

    Raises:
        UserError: a field does not exist or has an invalid value, or the model takes no image or needs one.
    """
    fields = {name: value if name in SHOWN else plain(value) for name, value in fields.items()}
    fields, memory = without_memory(fields)
    values = checked_fields(fields, where)
    if not values["prompt"].strip():
        raise UserError(f"{where}prompt: got {shown(values['prompt'])}; say what the video shows")
    has_pictures = "image" in values or "keyframes" in values
    if image_to_video != has_pictures and not (image_to_video and "video" in values):
        kind, advice = ("an image", "give its first frame as") if image_to_video else ("a text", "leave out")
        raise UserError(f"{where}image: this is {kind}-to-video model; {advice} `image`")
    files = {name: value for name, value in values.items() if value != IN_MEMORY}
    if "keyframes" in files:
        files["keyframes"] = tuple(entry for entry in files["keyframes"] if entry["image"] != IN_MEMORY)
    found = found_files(files, Path.cwd(), f"{where}image")
    if memory.video is not None:
        found["video"] = Path(IN_MEMORY)
    return PromptRequest(index, found.pop("prompt"), **found), memory


def without_memory(fields: Mapping[str, Any]) -> tuple[dict[str, Any], InMemory]:
    """Return the fields with `IN_MEMORY` for pictures and clips in memory, and these inputs."""
    named, memory = dict(fields), {}
    for name in ("image", "video"):
        value = named.get(name)
        if isinstance(value, Path):
            named[name] = str(value)
        elif value is not None and not isinstance(value, str):
            named[name], memory[name] = IN_MEMORY, value
    if isinstance(entries := named.get("keyframes"), list | tuple):
        named["keyframes"], kept = [], []
        for entry in entries:
            picture = entry.get("image") if isinstance(entry, Mapping) else None
            if isinstance(picture, Path):
                entry = {**entry, "image": str(picture)}
            elif picture is not None and not isinstance(picture, str):
                kept.append((picture, entry.get("at")))
                entry = {**entry, "image": IN_MEMORY}
            named["keyframes"].append(entry)
        memory["keyframes"] = tuple(kept)
    return named, InMemory(**memory)
